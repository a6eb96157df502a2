"""Hidden states in files: the same bytes as in memory, nothing left behind, and a message where the disk is full."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
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
    made.copy_(values)
    for part in made.split(2):
        part.mul_(2)
    rows = torch.tensor([2, 0])
    assert torch.equal(made[rows], 2 * values[rows])
    assert streams.empty(0, 4).shape == (0, 4)
    assert not list((tmp_path / "streams").iterdir())


@pytest.mark.parametrize("place", ["memory", "disk"])
def test_batches_come_back_as_they_came(place: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, 3, generator=generator) for size in (4, 0, 5, 1, 12, 2)]
    rows = Streams(torch.bfloat16, tmp_path if place == "disk" else None).rows(10)
    for batch in given:
        rows.append(batch)
    assert all(torch.equal(a, b) for a, b in zip(rows.batches(), given, strict=True))
    assert torch.equal(rows.joined(), torch.cat(given))
    assert not Streams(torch.bfloat16, None).rows(10).batches()


GROWTH = """
import sys
from pathlib import Path

import torch

from lbllm.memory import keep_large_allocations
from lbllm.streams import Streams


def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


keep_large_allocations()
torch.set_num_threads(1)
up, down, x = torch.ones(256, 1024), torch.ones(1024, 256), torch.ones(2048, 256)
rows = Streams(torch.bfloat16, Path(sys.argv[1])).rows(60 * 2048)
for number in range(60):
    gate = x @ up
    inner = gate * torch.relu(gate)
    output = x + inner @ down
    rows.append(inner.bfloat16())
    if number == 5:
        before = anonymous()
print(anonymous() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_does_not_grow_with_what_is_kept_in_files(tmp_path: Path) -> None:
    command = [sys.executable, "-c", GROWTH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert float(done.stdout) < 60  # MiB; a file for each batch: about 10 MiB a batch more


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
