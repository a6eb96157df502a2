"""A tiny teacher and its packed checkpoint for tests of the showcase, which write until they are stopped."""

from __future__ import annotations

from pathlib import Path

from lbllm.chat.pool import ModelPool, Slot
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

NAMES = ("teacher", "teacher binarized")
_LONG = {"max_position_embeddings": 8192}


def tiny_pair(root: Path) -> tuple[Path, Path]:
    """Folders of a teacher with room for long answers, and of a checkpoint that is made from it."""
    teacher = save_tiny(root / "teacher", "llama", **_LONG)
    run_tiny(run_config(stages=("ptq",), model=str(teacher)), root / "run", tiny_teacher("llama", **_LONG))
    return teacher, root / "run" / "checkpoint"


def endless_slots(teacher: Path, checkpoint: Path) -> tuple[Slot, Slot]:
    """Both models, loaded, without the token that ends an answer: what a test interrupts must not end by itself."""
    pool = ModelPool()
    slots = pool.get(str(teacher)), pool.get(str(checkpoint))
    for slot in slots:
        assert slot.wait(120)
        slot.loaded.model.generation_config.eos_token_id = None
        slot.loaded.tokenizer.eos_token = None
    return slots
