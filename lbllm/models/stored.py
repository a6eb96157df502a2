"""What the weights files of a folder hold, read from their headers: a model of shapes alone can't know it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from lbllm.models.loading import FileFault, settle_tied_weights
from lbllm.models.weights import StoredWeights


def untie_stored_head(model: PreTrainedModel, folder: Path) -> None:
    """Give a model on the meta device a head of its own where its config says that the embeddings are the head, but
    the safetensors files in ``folder`` have both, with different values. transformers then loads both."""
    pairs = model.get_expanded_tied_weights_keys(all_submodels=True)
    if not pairs:
        return
    try:
        weights = StoredWeights.find(str(folder))
        for target, source in pairs.items():
            # Files of a base model have the names without its own.
            first, second = (
                next((one for one in (name, name.partition(".")[2]) if one in weights.tensors), None)
                for name in (target, source)
            )
            if first is not None and second is not None and not weights.same_values(first, second):
                owner, _, last = target.rpartition(".")
                module = model.get_submodule(owner)
                setattr(module, last, nn.Parameter(torch.empty_like(getattr(module, last)), requires_grad=False))
    except (OSError, FileFault):
        return  # loading says what is wrong with the files
    settle_tied_weights(model)
