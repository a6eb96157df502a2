"""Model types of transformers: what the structure of each says, and whole runs of some that are unlike LLaMA."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from benchmarks.architectures import TYPES, tried
from lbllm.errors import LbllmError
from lbllm.models.blocks import check_supported
from lbllm.models.experts import split_experts
from lbllm.models.loading import quiet
from lbllm.quant.plan import block_formats
from lbllm.sections import QuantConfig

# alibi for each sequence; mask of a checked size; states of a convolution; these beside keys and values; no KV cache;
# matrices outside linear layers
UNLIKE = ("bloom", "xglm", "lfm2", "falcon_h1", "mamba2", "recurrent_gemma")
# What the message says, and of which types.
REFUSED: dict[str, tuple[str, ...]] = {
    "a cache of its own": ("minimax",),
    "never calls": ("mamba", "jamba"),  # the weights of a linear layer are used without it
    "divides its own weights": ("rwkv",),
}
_SMALL: dict[str, Any] = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    "kind", [kind if kind in UNLIKE else pytest.param(kind, marks=pytest.mark.soak) for kind in TYPES]
)
def test_a_run_of_every_decoder(kind: str) -> None:
    outcome = tried(kind)
    expected = next((said for said, kinds in REFUSED.items() if kind in kinds), "works")
    assert expected in outcome


def test_every_type_fits_or_is_refused_by_name() -> None:
    """On the meta device, with the defaults of each type where it does not take the small sizes."""
    built = 0
    for kind in sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        model: Any = None
        for sizes in (_SMALL, {"num_hidden_layers": 2}, {}):
            try:
                with torch.device("meta"), quiet():
                    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes))
                break
            except Exception:  # transformers can't make it of these sizes
                continue
        if model is None:
            continue
        built += 1
        said = ""
        try:
            split_experts(model)
            check_supported(model)
            fitting = any(block_formats(model, QuantConfig())[2])
        except LbllmError as error:
            said, fitting = str(error), False
        assert fitting or type(model).__name__ in said or "longer than a row" in said
    assert built > 0.85 * len(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
