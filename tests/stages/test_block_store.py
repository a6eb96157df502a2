"""The states of finished blocks: complete or absent, of this very run, and untouched by what is trained from them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lbllm.errors import CheckpointError, ModelError
from lbllm.models.streamed import weight_hashes
from lbllm.quant.activations import ActQuantizer
from lbllm.sections import LayerFormat, Stage
from lbllm.stages.block_state import BlockState, collect, restore
from lbllm.stages.block_store import BlockStore, check_weights, fingerprint
from lbllm.stages.distill import binary_layers
from tests.helpers.tiny_runs import run_config

MARK = "0" * 64
FORMAT = LayerFormat(format="w1+1", group_size=8, param_bits=16, act_bits=4)


def block() -> nn.Sequential:
    return nn.Sequential(nn.Linear(20, 6), nn.Linear(6, 20, bias=False))


def block_state(**changes: Any) -> BlockState:
    tensors = {"0.params": torch.rand(6, 3, 4), "0.index": torch.randint(0, 4, (6, 20), dtype=torch.uint8)}
    tensors |= {"1.params": torch.rand(20, 1, 4), "1.index": torch.randint(0, 4, (20, 6), dtype=torch.uint8)}
    tensors |= {f"{name}.act": torch.tensor([0.25, 0.9, 1.0]) for name in "01"}
    values: dict[str, Any] = {"tensors": tensors, "loss_before": 0.1, "loss_after": 1 / 3, "diverged": True}
    return BlockState(**values | changes)


def test_a_state_comes_back_as_it_was(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MARK)
    assert store.load("wat", 3) is None
    for losses in ((0.1, 1 / 3), (math.inf, 0.0)):
        state = block_state(loss_before=losses[0], loss_after=losses[1])
        store.save("wat", 3, state)
        loaded = store.load("wat", 3)
        assert loaded is not None
        assert (loaded.loss_before, loaded.loss_after, loaded.diverged) == (*losses, True)
        assert loaded.tensors.keys() == state.tensors.keys()
        assert all(torch.equal(loaded.tensors[name], tensor) for name, tensor in state.tensors.items())
    assert store.load("aar", 3) is None
    assert [path.name for path in store.folder.iterdir()] == ["wat-0003.safetensors"]


def test_a_foreign_state_is_refused_and_can_still_be_looked_at(tmp_path: Path) -> None:
    BlockStore(tmp_path, MARK).save("ptq", 0, block_state())
    with pytest.raises(CheckpointError, match=r"ptq-0000\.safetensors was made with another .*use another folder"):
        BlockStore(tmp_path, "1" * 64).load("ptq", 0)
    assert BlockStore(tmp_path, None).load("ptq", 0) is not None


def test_a_damaged_state_is_named(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MARK)
    store.save("ptq", 0, block_state())
    whole = store.path("ptq", 0).read_bytes()

    def without_metadata(path: Path) -> None:
        save_file({"a": torch.zeros(1)}, path, {"fingerprint": MARK})

    for damage in (
        lambda path: path.write_bytes(whole[:-1]),
        lambda path: path.write_bytes(whole[:4]),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\0" * len(whole)),
        without_metadata,
    ):
        damage(store.path("ptq", 0))
        with pytest.raises(CheckpointError, match=r"ptq-0000\.safetensors is damaged .*delete it and resume"):
            store.load("ptq", 0)


def test_a_flipped_bit_in_a_state_is_noticed(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MARK)
    store.save("ptq", 0, block_state())
    data = bytearray(store.path("ptq", 0).read_bytes())
    data[-1] ^= 1
    store.path("ptq", 0).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="is damaged"):
        store.load("ptq", 0)


def test_the_fingerprint_is_of_all_that_a_block_depends_on() -> None:
    config, teacher = run_config(), nn.Linear(3, 2)
    mark = fingerprint(config, weight_hashes(teacher), "text", "no")
    assert mark == fingerprint(run_config(), weight_hashes(teacher), "text", "no")
    for same in ({"device": "auto"}, {"preset": "paper"}, {"stages": ("ptq",)}):
        assert fingerprint(config.model_copy(update=same), weight_hashes(teacher), "text", "no") == mark
    others = [run_config(seed=1), run_config(model="other"), run_config(seq_len=16)]
    others += [
        run_config(**{section: change})
        for section, change in (
            ("quant", {"group_size": 17}),
            ("ptq", {"em_steps": 9}),
            ("wat", {"lr_weight": 0.5}),
            ("aar", {"lr_act": 0.5}),
        )
    ]
    marks = [fingerprint(other, weight_hashes(teacher), "text", "no") for other in others]
    marks += [
        fingerprint(config, weight_hashes(teacher), "text", "bf16"),
        fingerprint(config, weight_hashes(teacher), "other text", "no"),
    ]
    with torch.no_grad():
        teacher.weight[1, 2] += 1e-3
    marks.append(fingerprint(config, weight_hashes(teacher), "text", "no"))
    assert len({mark, *marks}) == 1 + len(marks)


def test_settings_that_came_later_leave_the_fingerprint_of_older_runs_alone() -> None:
    """As version 0.1 computed it: over the document that it wrote, which had none of these settings."""
    teacher = nn.Linear(3, 2)
    document = run_config().model_dump(mode="json", exclude={"preset", "device", "stages", "start", "stream_dtype"})
    for name in ("act_group_size", "embedding_bits", "kv_group_size", "kv_first"):
        del document["quant"][name]
    del document["aar"]["loss"], document["wat"]["streams"], document["e2e"]["gram_weight"]
    del document["e2e"]["lr_embeddings"]
    weights = {name: torch.hash_tensor(w).view(torch.int64).item() for name, w in teacher.named_parameters()}
    text = json.dumps([document, weights, "text", "no"], sort_keys=True)
    older = run_config(stream_dtype="float32")
    assert fingerprint(older, weight_hashes(teacher), "text", "no") == hashlib.sha256(text.encode()).hexdigest()
    changes: tuple[dict[str, Any], ...] = ({"aar": {"loss": "mse"}}, {"quant": {"embedding_bits": 8}})
    changes += ({"wat": {"streams": "both"}}, {"e2e": {"gram_weight": 1.0}}, {"quant": {"embedding_bits": 4}})
    for other in (run_config(), *(run_config(stream_dtype="float32", **one) for one in changes)):
        assert fingerprint(other, weight_hashes(teacher), "text", "no") != fingerprint(
            older, weight_hashes(teacher), "text", "no"
        )


def test_training_a_restored_block_leaves_the_state_alone() -> None:
    state, teacher = block_state(), block()
    formats = {"0": FORMAT, "1": FORMAT}
    before = {name: tensor.clone() for name, tensor in state.tensors.items()}
    student = restore(teacher, formats, state.tensors, 2)
    layers = binary_layers(student)
    assert collect(layers).keys() == before.keys()
    assert all(torch.equal(tensor, before[name]) for name, tensor in collect(layers).items())
    assert layers["0"].bias is teacher[0].bias
    assert torch.equal(student(torch.ones(1, 20)), restore(teacher, formats, before, 2)(torch.ones(1, 20)))
    with torch.no_grad():
        for layer in layers.values():
            layer.params.add_(1)
            assert layer.quantizer is not None
            layer.quantizer.act.add_(1)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state.tensors.items())


def test_layers_that_share_a_quantizer_are_stored_one_by_one(tmp_path: Path) -> None:
    tensors = {name: tensor for name, tensor in block_state().tensors.items() if not name.endswith(".act")}
    layers = binary_layers(restore(block(), {"0": FORMAT, "1": FORMAT}, tensors, 2))
    assert layers["0"].quantizer is None
    layers["0"].quantizer = layers["1"].quantizer = ActQuantizer(4, 2)
    store = BlockStore(tmp_path, MARK)
    store.save("aar", 0, block_state(tensors=collect(layers)))
    loaded = store.load("aar", 0)
    assert loaded is not None
    assert torch.equal(loaded.tensors["0.act"], loaded.tensors["1.act"])


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("0.params", None),
        ("1.index", None),
        ("0.params", torch.rand(6, 2, 4)),
        ("0.params", torch.rand(6, 3, 2)),
        ("0.index", torch.full((6, 20), 4, dtype=torch.uint8)),
        ("0.index", torch.zeros(6, 20)),
        ("0.index", torch.zeros(20, 6, dtype=torch.uint8)),
        ("1.act", torch.ones(1, 3)),
        ("1.act", torch.ones(4)),
        ("0.latent", torch.rand(20, 6)),
        ("0.scale", torch.rand(6).half()),
    ],
)
def test_a_state_of_other_layers_is_refused(name: str, tensor: torch.Tensor | None, tmp_path: Path) -> None:
    tensors = block_state().tensors
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    with pytest.raises(CheckpointError, match=rf"the state of {name[0]}: .*delete the file and resume"):
        restore(block(), dict.fromkeys("01", FORMAT), tensors, 3)


def test_a_damaged_state_is_told_in_a_short_message(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MARK)
    header = b'{"__metadata__": "' + b"a" * 100_000 + b'"}'
    store.path("ptq", 0).write_bytes(len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match=r"ptq-0000\.safetensors is damaged .*delete it and resume") as raised:
        store.load("ptq", 0)
    assert len(str(raised.value)) < 500


def test_a_state_in_another_place_is_refused(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MARK, ("ptq", "wat"))
    places: tuple[tuple[Stage, int], ...] = (("ptq", 0), ("ptq", 1), ("wat", 0))
    for stage, number in places:
        store.save(stage, number, block_state())
    whole = {place: store.path(*place).read_bytes() for place in places}
    for source, target in itertools.permutations(places, 2):
        store.path(*target).write_bytes(whole[source])
        for reader in (store, BlockStore(tmp_path, None)):  # also one that does not know the run
            message = (
                rf"{target[0]}-000{target[1]}\.safetensors is the state of block {source[1]} after stage {source[0]}"
            )
            with pytest.raises(CheckpointError, match=message):
                reader.load(*target)
        store.path(*target).write_bytes(whole[target])
        assert store.load(*target) is not None


def test_states_of_two_runs_are_not_mixed(tmp_path: Path) -> None:
    for name, mark in (("one", MARK), ("other", "1" * 64)):
        for number in range(2):
            BlockStore(tmp_path / name, mark).save("ptq", number, block_state())
    one, other = (BlockStore(tmp_path / name, None) for name in ("one", "other"))
    one.path("ptq", 1).write_bytes(other.path("ptq", 1).read_bytes())
    assert one.load("ptq", 0) is not None
    with pytest.raises(
        CheckpointError, match=r"ptq-0001\.safetensors and .*ptq-0000\.safetensors are of different runs"
    ):
        one.load("ptq", 1)


def test_a_state_made_after_other_stages_is_refused(tmp_path: Path) -> None:
    BlockStore(tmp_path, MARK, ("ptq", "wat", "aar")).save("aar", 0, block_state())
    assert BlockStore(tmp_path, MARK, ("ptq", "wat", "aar", "e2e")).load("aar", 0) is not None
    with pytest.raises(CheckpointError, match=r"after the stages ptq\+wat, and this run has ptq before aar"):
        BlockStore(tmp_path, MARK, ("ptq", "aar")).load("aar", 0)


def test_every_flipped_byte_of_a_state_s_metadata_is_noticed(tmp_path: Path) -> None:
    store = BlockStore(tmp_path, MARK)
    store.save("ptq", 0, block_state())
    path = store.path("ptq", 0)
    whole = path.read_bytes()
    for place in range(8, whole.index(b"}") + 1):
        data = bytearray(whole)
        data[place] ^= 1
        path.write_bytes(bytes(data))
        with pytest.raises(CheckpointError, match="ptq-0000"):
            BlockStore(tmp_path, MARK).load("ptq", 0)


def test_a_weights_file_that_changed_since_the_run_began_is_named(tmp_path: Path) -> None:
    weights, files = {"a": 1, "b": 2}, {"a": "model-00001.safetensors", "b": "model-00002.safetensors"}
    check_weights(tmp_path, "teacher", weights, files)
    check_weights(tmp_path, "teacher", weights, files)
    check_weights(tmp_path, "teacher", weights | {"b": 3}, files)  # nothing is trained yet
    (tmp_path / "blocks").mkdir()
    (tmp_path / "blocks" / "ptq-0000.safetensors").touch()
    with pytest.raises(ModelError, match=r"teacher: model-00002\.safetensors has changed since this run began \(b\)"):
        check_weights(tmp_path, "teacher", weights, files)
    (tmp_path / "teacher.json").write_text("damaged")
    check_weights(tmp_path, "teacher", weights, files)
    check_weights(tmp_path, "teacher", {"a": 9}, {})
