"""A checkpoint in the folder of its run: what its layers were before training, and the latent weights that it kept."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lbllm.errors import CheckpointError
from lbllm.microscope.layer import flipped
from lbllm.microscope.microscope import Microscope
from lbllm.quant.levels import params_to_levels
from lbllm.runs.store import RunStore
from lbllm.stages.block_store import BlockStore
from tests.helpers.finished_run import finished_run
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

PLACES = ("0/mlp.up_proj", "1/self_attn.k_proj")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The folder of a finished run of stages 1, 2 and 4, and its teacher's."""
    folder, teacher = tmp_path_factory.mktemp("before"), tiny_teacher("llama")
    teacher.model.save_pretrained(folder / "teacher")
    teacher.tokenizer.save_pretrained(folder / "teacher")
    e2e = {"tokens": 128, "batch_tokens": 64, "seq_len": 32, "lr_weight": 0.02}
    run_tiny(run_config(stages=["ptq", "wat", "e2e"], e2e=e2e), folder / "run", teacher)
    return folder / "run", folder / "teacher"


@pytest.fixture
def copied(run: tuple[Path, Path], tmp_path: Path) -> tuple[Path, Path]:
    return Path(shutil.copytree(run[0], tmp_path / "run")), run[1]


def opened(run: tuple[Path, Path]) -> Microscope:
    return Microscope.open(str(run[0]), str(run[1]))


def state(run: tuple[Path, Path], stage: str, block: int) -> dict[str, torch.Tensor]:
    return load_file(run[0] / "blocks" / f"{stage}-{block:04d}.safetensors")


@pytest.mark.parametrize("place", PLACES)
def test_before_training_is_the_state_after_stage_1(run: tuple[Path, Path], place: str) -> None:
    found = opened(run)
    assert (found.before_words, found.latent_words) == ("after stage 1 of its run", "after stage 4 of its run")
    layer = found.layer(place)
    block, name = int(place[0]), place[2:]
    first, last = state(run, "ptq", block), state(run, "e2e", block)
    levels, index = layer.before(slice(0, layer.shape[0]))
    assert torch.equal(levels, params_to_levels(first[f"{name}.params"]))
    assert torch.equal(index, first[f"{name}.index"])
    assert layer.flip_rows == layer.shape[0]
    assert (layer.sign_flips, layer.bitmap_flips) == flipped(last[f"{name}.index"], first[f"{name}.index"], 4)
    assert layer.sign_flips > 0
    assert layer.latent is not None
    assert torch.equal(layer.latent, last[f"{name}.latent"].float())
    view = layer.group(5, 2)
    assert torch.equal(view.before_levels, levels[5, 2])
    assert torch.equal(view.before_index, index[5, view.columns])
    assert view.latent is not None
    assert torch.equal(view.latent, layer.latent[5, view.columns])
    # A latent weight is trained, so it is neither the teacher's nor the stored weight.
    assert not torch.equal(view.latent, view.weights)
    assert not torch.equal(view.latent, view.rebuilt)
    assert "stage 1" in found.overview("signs").about
    assert found.overview("signs").values[block][found.layers.index(name)] == layer.sign_flips


def test_without_the_states_of_all_blocks_the_teacher_is_clustered(copied: tuple[Path, Path]) -> None:
    (copied[0] / "blocks" / "e2e-0001.safetensors").unlink()
    assert opened(copied).latent_words == "after stage 1 of its run"
    (copied[0] / "blocks" / "ptq-0001.safetensors").unlink()
    found = opened(copied)
    assert (found.latent_words, found.layer(PLACES[0]).latent) == ("", None)
    assert "fit_levels" in found.before_words
    shutil.rmtree(copied[0] / "blocks")
    assert "fit_levels" in opened(copied).before_words
    assert not (copied[0] / "blocks").exists()


def test_a_copied_checkpoint_has_no_states(run: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.copytree(run[0] / "checkpoint", tmp_path / "elsewhere")
    assert "fit_levels" in opened((tmp_path / "elsewhere", run[1])).before_words


def test_a_damaged_state_is_named(copied: tuple[Path, Path]) -> None:
    file = copied[0] / "blocks" / "ptq-0000.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    found = opened(copied)  # only headers are read before a layer is looked at
    with pytest.raises(CheckpointError, match=r"ptq-0000\.safetensors is damaged \(its hash differs\)"):
        found.layer(PLACES[0]).group(0, 0)
    assert found.overview("error").values[0][0] is not None
    file.write_bytes(data[:-10])
    with pytest.raises(CheckpointError, match=r"ptq-0000\.safetensors"):
        opened(copied)


def test_a_state_that_is_lost_while_it_is_looked_at(copied: tuple[Path, Path]) -> None:
    layer = opened(copied).layer(PLACES[0])
    layer.group(0, 0)
    shutil.rmtree(copied[0] / "blocks")
    for asked in (lambda: layer.group(1, 0), lambda: layer.latent):
        with pytest.raises(CheckpointError, match=r"is missing.*open the checkpoint again"):
            asked()


def test_a_run_from_a_checkpoint_began_with_that(copied: tuple[Path, Path]) -> None:
    states = [BlockStore(copied[0], None).finished("ptq", block) for block in (0, 1)]
    shutil.rmtree(copied[0] / "blocks")
    store = BlockStore(copied[0], "mark")
    for block, one in enumerate(states):
        store.save("start", block, one)
    found = opened(copied)
    words = "the checkpoint that its run started from", "those that its run started from"
    assert (found.before_words, found.latent_words) == words
    assert torch.equal(found.layer(PLACES[0]).before(slice(2, 4))[1], states[0].tensors["mlp.up_proj.index"][2:4])


def test_states_of_another_run_are_named(copied: tuple[Path, Path]) -> None:
    other = copied[0].parent / "other"
    run_tiny(run_config(quant={"group_size": 8}, stages=["ptq"]), other, tiny_teacher("llama"))
    shutil.rmtree(copied[0] / "blocks")
    shutil.copytree(other / "blocks", copied[0] / "blocks")
    with pytest.raises(CheckpointError, match=r"mlp\.up_proj\.params of block 0 is not that of this checkpoint"):
        opened(copied).layer(PLACES[0]).before(slice(0, 1))


def test_a_run_is_found_by_its_id_with_its_own_teacher(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "runs")
    done = finished_run(store, tmp_path, ("ptq",))
    found = Microscope.open(done.id, store=store)
    assert (found.title, found.teacher_title) == (done.id, "teacher")
    assert (found.before_words, found.latent_words) == ("after stage 1 of its run", "after stage 1 of its run")
    assert found.overview("signs").values[0] == (0.0,) * len(found.layers)  # nothing was trained
    store.close()
