"""Hidden states in files: the same bytes as in memory, nothing left behind, and a message where the disk is full."""

from __future__ import annotations

import errno
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lbllm.errors import ResourceError
from lbllm.measure import needs
from lbllm.pipeline import run as pipeline
from lbllm.streams import Streams
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_run_gives_the_same_bytes_wherever_its_streams_lie(
    dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for place in ("memory", "disk"):

        def placed(*args: Any, place: Any = place, **options: Any) -> needs.Needs:
            return replace(needs.needs(*args, **options), streams=place)

        monkeypatch.setattr(pipeline, "needs", placed)
        run_tiny(run_config(stages=["ptq", "wat", "aar"], stream_dtype=dtype), tmp_path / place, tiny_teacher("llama"))
        found.append({file.name: load_file(file) for file in (tmp_path / place / "blocks").iterdir()})
    assert len(found[0]) == 6
    assert found[0].keys() == found[1].keys()
    for name, tensors in found[0].items():
        assert tensors.keys() == found[1][name].keys()
        assert all(torch.equal(tensor, found[1][name][key]) for key, tensor in tensors.items())
    assert not (tmp_path / "memory" / "streams").exists()
    assert not list((tmp_path / "disk" / "streams").iterdir())


def test_tensors_in_files_are_ordinary_tensors(tmp_path: Path) -> None:
    streams = Streams(torch.bfloat16, tmp_path / "streams")
    made = streams.empty(3, 4, 5)
    assert (made.dtype, made.shape, made.device.type) == (torch.bfloat16, (3, 4, 5), "cpu")
    values = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).bfloat16()
    kept = streams.kept(values)
    assert kept.data_ptr() != values.data_ptr()
    made.copy_(kept)
    for part in made.split(2):
        part.mul_(2)
    rows = torch.tensor([2, 0])
    assert torch.equal(made[rows], 2 * values[rows])
    assert torch.equal(kept, values)
    assert streams.empty(0, 4).shape == (0, 4)
    assert not list((tmp_path / "streams").iterdir())


def test_a_disk_without_space_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(ResourceError, match=r"hidden states of all tokens, 0\.0 GB \(No space left"):
        Streams(torch.float32, tmp_path).empty(10, 10)
    assert not list(tmp_path.iterdir())


def test_stage_2_on_both_streams_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Into the first block both streams bring the same, into the second they don't."""
    states = {}
    for kind in ("student", "both"):
        settings = run_config(stages=["ptq", "wat"], wat={"streams": kind})
        run_tiny(settings, tmp_path / kind, tiny_teacher("llama"))
        states[kind] = [load_file(tmp_path / kind / "blocks" / f"wat-{number:04d}.safetensors") for number in (0, 1)]
    for number in (0, 1):
        one, other = (states[kind][number] for kind in ("student", "both"))
        close = all(torch.allclose(one[name], other[name], atol=1e-4) for name in one if name.endswith(".params"))
        assert close == (number == 0)
    settings = run_config(stages=["ptq", "wat"], wat={"streams": "both"})
    file = tmp_path / "both" / "blocks" / "wat-0001.safetensors"
    file.unlink()
    run_tiny(settings, tmp_path / "both", tiny_teacher("llama"))
    again = load_file(file)
    assert all(torch.equal(again[name], tensor) for name, tensor in states["both"][1].items())
