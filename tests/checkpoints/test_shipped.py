"""The checkpoint in assets/: taken apart and put together again it is the same file; anything else is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lbllm import load
from lbllm.checkpoints import shipped
from lbllm.checkpoints.hf import is_checkpoint
from lbllm.checkpoints.seal import is_sealed
from lbllm.checkpoints.shipped import PACKED, assemble, shipped_checkpoint, strip
from lbllm.errors import CheckpointError, ResourceError
from lbllm.models.teacher import load_teacher
from tests.helpers import ROOT
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

MAPPED = """
import re, sys
from pathlib import Path
import torch
from lbllm import kernels, load
from lbllm.checkpoints.shipped import shipped_checkpoint
model, _ = load(shipped_checkpoint())
assert kernels.ready()
ids = torch.arange(1000, 1010)[None]
model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=4)
resident, ours = 0, False
for line in Path("/proc/self/smaps").read_text().splitlines():
    if re.match("[0-9a-f]+-[0-9a-f]+ ", line):
        ours = line.endswith("model.safetensors")
    elif ours and line.startswith("Rss:"):
        resident += int(line.split()[1])
print(resident)
"""


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


def test_put_together_twice_at_once_it_is_there_all_the_time(checkpoint: Path, tmp_path: Path) -> None:
    strip(checkpoint, tmp_path / "stripped")
    teacher, whole = tiny_teacher("llama"), tmp_path / "whole"
    assemble(tmp_path / "stripped", teacher, whole)
    with ThreadPoolExecutor(2) as pool:
        made = [pool.submit(assemble, tmp_path / "stripped", teacher, whole) for _ in range(6)]
        while not all(one.done() for one in made):
            assert is_checkpoint(whole)
        for one in made:
            one.result()
    load(whole)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["stripped", "whole"]


@pytest.fixture
def small_assets(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tiny assets in the place of the project's, and a cache of their own; returns the cache."""
    strip(checkpoint, tmp_path / "assets")
    monkeypatch.setattr(shipped, "ASSET_FOLDER", tmp_path / "assets")
    monkeypatch.setattr(shipped, "load_teacher", lambda name: tiny_teacher("llama"))
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def test_an_assembled_checkpoint_is_sealed_and_a_damaged_one_is_replaced(
    small_assets: Path,
) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: shipped_checkpoint(), range(2))
    assert first == second
    assert is_sealed(first)
    written = (first / "config.json").stat().st_ino
    assert shipped_checkpoint() == first
    assert (first / "config.json").stat().st_ino == written
    document = json.loads((first / "config.json").read_text())
    del document["quantization_config"]["seal"]
    (first / "config.json").write_text(json.dumps(document))
    load(shipped_checkpoint())
    assert is_sealed(first)
    # So is one that was damaged.
    data = bytearray((first / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (first / "model.safetensors").write_bytes(data)
    load(shipped_checkpoint())
    assert [path.name for path in first.parent.iterdir() if not path.name.endswith(".lock")] == [first.name]


def test_a_place_that_can_not_be_written_and_damaged_assets_are_named(small_assets: Path, tmp_path: Path) -> None:
    small_assets.write_text("a file in the place of the folder")
    with pytest.raises(ResourceError, match=r"home.*can't be written"):
        shipped_checkpoint()
    small_assets.unlink()
    packed = tmp_path / "assets" / PACKED
    whole = packed.read_bytes()
    packed.write_bytes(whole[:50])
    with pytest.raises(CheckpointError, match=r"packed\.safetensors can't be read .*assets again"):
        shipped_checkpoint()
    packed.write_bytes(whole)
    config = tmp_path / "assets" / "config.json"
    text = config.read_text()
    for damaged in (text.replace('"hidden_act": "silu"', '"hidden_act": "gelu"'), "{"):
        assert damaged != text
        config.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"assets/config\.json"):
            shipped_checkpoint()
    config.write_text(text)
    (tmp_path / "assets" / "generation_config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"assets/generation_config\.json is not the file"):
        shipped_checkpoint()


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


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="memory is counted by Linux's /proc")
def test_what_was_read_of_its_file_does_not_stay_in_memory_beside_the_model() -> None:
    result = subprocess.run([sys.executable, "-c", MAPPED], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    # In kB, of 97 MB; the bits that the kernels arrange anew for themselves are 40 MB of it.
    assert int(result.stdout) < 5_000


def test_the_assets_are_sealed() -> None:
    assert is_sealed(shipped.ASSET_FOLDER)
