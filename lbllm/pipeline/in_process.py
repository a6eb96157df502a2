"""``lbllm.quantize``: run the stages in the calling process, on a model that is already loaded."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.checkpoints.hf import load
from lbllm.config import RunConfig
from lbllm.errors import CorpusError
from lbllm.events import Event
from lbllm.models.loading import settle_tied_weights
from lbllm.models.teacher import Teacher
from lbllm.pipeline import run as pipeline
from lbllm.texts.corpus import Corpus, sequences_hash


def quantize(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    config: RunConfig | None = None,
    *,
    out: str | Path | None = None,
    sequences: Tensor | None = None,
    on_event: Callable[[Event], None] | None = None,
) -> PreTrainedModel:
    """Binarize a loaded model and return the packed model, in the same dtype; the given model does not change.

    ``sequences``: token ids (n, T), T at least 8, to calibrate and train on instead of the configured corpus. ``out``:
    a folder for the state of every block and for the result, ``out/checkpoint``; a second call with the same folder
    continues where the first one ended. ``config.model`` is not used. Raises LbllmError for settings, texts or models
    that can't work.
    """
    config = (config or RunConfig()).model_copy(update={"model": model.name_or_path or type(model).__name__})
    teacher = Teacher(config.model, _teacher(model), tokenizer, str(model.dtype).removeprefix("torch."), "not stated")
    corpus = None
    if sequences is not None:
        if sequences.ndim != 2 or sequences.shape[1] < 8:
            raise CorpusError(f"sequences of shape {tuple(sequences.shape)}: give token ids (n, T) with T at least 8")
        corpus = Corpus("given sequences", sequences_hash(sequences), sequences)
        config = config.model_copy(update={"seq_len": sequences.shape[1], "corpus": "given sequences"})
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(out) if out is not None else Path(scratch)
        for event in pipeline.run(config, folder, request=lambda: None, teacher=teacher, corpus=corpus):
            if on_event is not None:
                on_event(event)
        return load(folder / "checkpoint", dtype=model.dtype)[0]


def _teacher(model: PreTrainedModel) -> PreTrainedModel:
    """Return a float32 copy in eval mode without gradients; it shares weights that are already float32.

    Its config says whether its output head is its embeddings, whatever that of the given model says.
    """
    memo: dict[int, Tensor] = {id(p): nn.Parameter(p.detach(), requires_grad=False) for p in model.parameters()}
    memo |= {id(buffer): buffer for buffer in model.buffers()}
    frozen: PreTrainedModel = copy.deepcopy(model, memo)
    frozen = frozen.float().eval()
    settle_tied_weights(frozen)
    return frozen
