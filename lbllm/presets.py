"""The named starting points of a run's settings, as data."""

from __future__ import annotations

from typing import Any

from lbllm.sections import ACT_GROUP_SIZE, KV_GROUP_SIZE, STAGES

# What each preset is, in one sentence, for pages and the command line.
ABOUT = {
    "preview": "Our method in minutes, to see whether it works: little text, only stages 1 and 2, weights only.",
    "quick": "Our method for the embedded model on two cores: standard with less text.",
    "standard": "Our method, a real attempt; unlike the paper's it has groups of 16 with 4-bit parameters, activation "
    "ranges of 64 inputs, keys cached in groups of 64 tokens, sweeps and drift correction in stage 1, a coupled "
    "bitmap, a relative loss, and stage 4.",
    "paper": "The paper's method as described, with its amount of text: groups of 128, one activation range per token, "
    "a relaxed bitmap, the squared error and three stages; needs a GPU.",
}
# Weights: as many bits as groups of 64 with float16 parameters, and about half their error.
FINE = {"group_size": 16, "param_bits": 4, "act_group_size": ACT_GROUP_SIZE, "kv_group_size": KV_GROUP_SIZE}
PRESETS: dict[str, dict[str, Any]] = {
    # Weights alone: so little text can't make up for what 4-bit activations cost. Small steps, because there are few.
    "preview": {
        "stages": STAGES[:2],
        "quant": FINE,
        "seq_len": 256,
        "ptq": {"tokens": 2_048, "sweeps": 1},
        "wat": {"tokens": 2_048, "epochs": 1, "batch_tokens": 256, "lr_weight": 1e-2},
        "aar": {"tokens": 2_048, "search_tokens": 1_024},
    },
    # The last minutes do more in stage 4 than in a second pass of stage 3.
    "quick": {"stages": STAGES, "quant": FINE, "aar": {"epochs": 1}, "e2e": {"tokens": 8_192}},
    "standard": {
        "stages": STAGES,
        "quant": FINE,
        "seq_len": 1_024,
        "ptq": {"tokens": 65_536},
        "wat": {"tokens": 262_144, "epochs": 2, "batch_tokens": 2_048},
        "aar": {"tokens": 131_072, "epochs": 2, "batch_tokens": 2_048},
    },
    "paper": {
        "seq_len": 2_048,
        "corpus": "redpajama",
        "quant": {"group_size": 128},
        "ptq": {"tokens": 262_144, "sweeps": 0, "align": 0.0},
        "wat": {
            "tokens": 16_777_216,
            "epochs": 1,
            "batch_tokens": 4_096,
            "lr_weight": 1e-3,
            "lr_bitmap": 1e-2,
            "bitmap": "relaxed",
            "reg_weight": 1_000.0,
            "loss": "mse",
        },
        "aar": {"tokens": 16_777_216, "epochs": 1, "batch_tokens": 4_096, "lr_act": 1e-3, "loss": "mse"},
    },
}
