"""Whole runs of tiny models in the testing process, in a second or two each."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from lbllm.config import RunConfig, parse_config
from lbllm.events import Event
from lbllm.models.teacher import Teacher
from lbllm.pipeline import run as pipeline
from lbllm.texts.corpus import Corpus, sequences_hash
from tests.helpers.tiny_models import SENTENCES, VOCABULARY, save_tiny, tiny

SEQ_LEN = 32


def run_config(**changes: Any) -> RunConfig:
    """Settings of a run with two or four optimizer steps a block; ``changes`` to its sections."""
    small = {"tokens": 128, "epochs": 1, "batch_tokens": 64}
    base: dict[str, Any] = {"model": "tiny", "corpus": "given", "seq_len": SEQ_LEN, "device": "cpu"}
    base |= {"quant": {"group_size": 16}, "ptq": {"tokens": 128, "em_steps": 3, "sweeps": 1}}
    base |= {"wat": small, "aar": small | {"search_tokens": 64}}
    for key, value in changes.items():
        base[key] = base.get(key, {}) | value if isinstance(value, dict) else value
    return parse_config({"preset": "preview"} | base)


def stored_run_config(folder: Path) -> RunConfig:
    """Settings of a run that a worker can do in seconds; its teacher and its text are written to ``folder``."""
    generator = random.Random(0)
    text = folder / "text.txt"
    text.write_text("\n".join(" ".join(generator.choices(SENTENCES, k=4)) for _ in range(400)))
    changes = {
        "model": str(save_tiny(folder / "teacher", "llama")),
        "corpus": str(text),
        "seq_len": 32,
        "device": "cpu",
        "quant": {"group_size": 16},
        "ptq": {"tokens": 256, "em_steps": 4, "sweeps": 1},
        "wat": {"tokens": 512, "epochs": 1, "batch_tokens": 64},
        "aar": {"tokens": 512, "epochs": 1, "batch_tokens": 64, "search_tokens": 128},
    }
    return parse_config({"preset": "preview"} | changes)


def token_ids(count: int = 4, seed: int = 0) -> Tensor:
    """Random token ids (count, SEQ_LEN)."""
    return torch.randint(3, VOCABULARY, (count, SEQ_LEN), generator=torch.Generator().manual_seed(seed))


def tiny_teacher(architecture: str, **changes: Any) -> Teacher:
    """A tiny model as ``load_teacher`` would give it."""
    model, tokenizer = tiny(architecture, **changes)
    return Teacher("tiny", model.requires_grad_(False), tokenizer, "float32", "none")


def bfloat_teacher() -> Teacher:
    """A tiny teacher of bfloat16 values: what stays dense is the same in its packed student."""
    teacher = tiny_teacher("llama")
    teacher.model.bfloat16().float()
    return teacher


def run_tiny(
    config: RunConfig,
    folder: Path,
    teacher: Teacher,
    *,
    request: Callable[[], Literal["stop", "cancel"] | None] = lambda: None,
    precision: str = "no",
    seen: list[Event] | None = None,
) -> list[Event]:
    """All events of a run in ``folder``, on ``token_ids()``; ``seen`` has them as they come, for ``request``."""
    folder.mkdir(parents=True, exist_ok=True)
    # As if the run had begun before: measuring which precision is faster would take longer than the run.
    (folder / "precision").write_text(precision)
    sequences = token_ids()
    corpus = Corpus("given", sequences_hash(sequences), sequences)
    events = seen if seen is not None else []
    for event in pipeline.run(config, folder, request=request, teacher=teacher, corpus=corpus):
        events.append(event)
    return events
