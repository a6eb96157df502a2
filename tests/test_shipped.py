"""The checkpoint in assets/: taken apart and put together again it is the same file; anything else is refused."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbllm import load
from lbllm.errors import CheckpointError
from lbllm.models import load_teacher
from lbllm.shipped import PACKED, assemble, shipped_checkpoint, strip
from tests.tiny_runs import run_config, run_tiny, tiny_teacher


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    run_tiny(run_config(), folder, tiny_teacher("llama"))
    return folder / "checkpoint"


def test_taken_apart_and_put_together_it_is_the_same_file(checkpoint: Path, tmp_path: Path) -> None:
    strip(checkpoint, tmp_path / "stripped")
    assert not any("embed" in name or "norm" in name for name in load_file(tmp_path / "stripped" / PACKED))
    assemble(tmp_path / "stripped", tiny_teacher("llama"), tmp_path / "whole")
    assert (tmp_path / "whole/model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    load(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stripped", "whole"]


def test_other_bits_or_another_teacher_are_refused_and_nothing_is_left(checkpoint: Path, tmp_path: Path) -> None:
    strip(checkpoint, tmp_path / "stripped")
    with pytest.raises(CheckpointError, match=r"packed\.safetensors"):
        assemble(tmp_path / "stripped", tiny_teacher("llama", seed=1), tmp_path / "whole")
    tensors = load_file(tmp_path / "stripped" / PACKED)
    name = next(name for name in tensors if name.endswith(".weight"))
    tensors[name] = tensors[name] ^ 1
    save_file(tensors, tmp_path / "stripped" / PACKED)
    with pytest.raises(CheckpointError, match=r"packed\.safetensors"):
        assemble(tmp_path / "stripped", tiny_teacher("llama"), tmp_path / "whole")
    assert [path.name for path in tmp_path.iterdir()] == ["stripped"]


def test_the_shipped_checkpoint_follows_its_teacher() -> None:
    model, tokenizer = load(shipped_checkpoint())
    teacher = load_teacher("smollm2-135m-instruct")
    ids = tokenizer("The Moon goes round the Earth, and the Earth goes round the Sun.", return_tensors="pt").input_ids
    with torch.no_grad():
        loss, meant = (one(input_ids=ids, labels=ids).loss for one in (model, teacher.model))
    assert float(loss) < float(meant) + 4  # an untrained model is 8 nats a token from it
