"""Weights in several files: written one after the other they are what transformers writes, and every reader checks them
all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import lbllm
from lbllm.checkpoints import seal
from lbllm.checkpoints.hf import LbllmConfig, LbllmQuantizer, replace_layers, save_packed, save_packed_parts
from lbllm.checkpoints.record import copy_public, read_record
from lbllm.checkpoints.weights import WEIGHTS, remove_old, save_parts, weights_bytes, weights_files, write_weights
from lbllm.errors import CheckpointError
from lbllm.files import file_sha256
from lbllm.models.loading import INDEX, FileFault
from lbllm.sections import QuantConfig
from tests.helpers.tiny_models import tiny, tiny_config, tiny_tokenizer

LARGEST = 20_000  # bytes: a tiny model is then in several files
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama_bias": {},
    "qwen2": {},
    "gpt2": {},
    "gemma3": {},
    "gpt_neox": {},  # its head has another name in files than in the model
    "opt": {"tie_word_embeddings": False},
}


def prepared(model: PreTrainedModel) -> PreTrainedModel:
    quant = QuantConfig(group_size=16)
    model.config.quantization_config = LbllmConfig(quant=quant.model_dump(mode="json"), bpw=2.5)
    return model


def packed_model(architecture: str, **changes: Any) -> PreTrainedModel:
    """A packed model of random bits in memory."""
    model = prepared(tiny(architecture, **changes)[0].bfloat16())
    replace_layers(model, model.config.quantization_config.format)
    model.hf_quantizer = LbllmQuantizer(model.config.quantization_config)  # type: ignore[assignment]
    generator = torch.Generator().manual_seed(0)
    for name, tensor in model.state_dict().items():
        if tensor.dtype in (torch.uint8, torch.float16):
            tensor.copy_(torch.randint(0, 16, tensor.shape, generator=generator))
        elif name.endswith(".act"):
            tensor.copy_(torch.tensor([0.1, -1.0, 1.0]))
    return model


def skeleton(architecture: str, **changes: Any) -> PreTrainedModel:
    """The dense model's structure on the meta device, in float32 as a teacher's."""
    with torch.device("meta"):
        return prepared(AutoModelForCausalLM.from_config(tiny_config(architecture, **changes)))


def by_transformers(architecture: str, folder: Path, largest: int = 10**9, **changes: Any) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    save_packed(packed_model(architecture, **changes), folder, max_shard_size=largest)
    return folder


def in_parts(architecture: str, folder: Path, largest: int = 10**9, **changes: Any) -> Path:
    tiny_tokenizer().save_pretrained(folder)
    tensors = iter(packed_model(architecture, **changes).state_dict().items())
    save_packed_parts(skeleton(architecture, **changes), tensors, folder, largest=largest)
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in weights_files(folder) for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("architecture", MODELS)
def test_tensor_by_tensor_it_is_the_folder_that_is_saved_from_memory(architecture: str, tmp_path: Path) -> None:
    changes = MODELS[architecture]
    whole = contents(by_transformers(architecture, tmp_path / "whole", **changes))
    assert contents(in_parts(architecture, tmp_path / "parts", **changes)) == whole
    assert WEIGHTS in whole
    sharded = in_parts(architecture, tmp_path / "sharded", LARGEST, **changes)
    names = {path.name for path in weights_files(sharded)}
    assert len(names) >= 3
    assert {name for name in contents(sharded) if "safetensors" in name} == names | {INDEX}
    if architecture != "gpt_neox":  # transformers sorts the tensors before it converts their names
        assert contents(sharded) == contents(by_transformers(architecture, tmp_path / "shards", LARGEST, **changes))
    wanted = load_file(tmp_path / "whole" / WEIGHTS)
    found = tensors_of(sharded)
    assert ("embed_out.weight" in found) == (architecture == "gpt_neox")
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor)
    assert weights_bytes(sharded) == sum(len(data) for name, data in contents(sharded).items() if name in names)
    memory = packed_model(architecture, **changes).state_dict()
    for model in (lbllm.load(sharded, dtype=torch.bfloat16)[0], AutoModelForCausalLM.from_pretrained(sharded)):
        state = model.state_dict()
        assert state.keys() == memory.keys()
        for name, tensor in memory.items():
            assert torch.equal(state[name].to(tensor.dtype), tensor), name


def test_files_are_full_by_the_rule_of_transformers_and_one_tensor_is_in_memory_at_a_time(tmp_path: Path) -> None:
    sizes = [6, 6, 2, 30, 6, 2, 2]
    alive: list[int] = []

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for number, size in enumerate(sizes):
            alive.append(len(list(tmp_path.iterdir())))
            yield f"t{number}", torch.full((size,), number, dtype=torch.uint8)

    files = write_weights(tmp_path, tensors(), largest=10)
    assert [path.name for path in files] == [f"model-{k:05d}-of-00004.safetensors" for k in (1, 2, 3, 4)]
    assert [sorted(load_file(path)) for path in files] == [["t0"], ["t3"], ["t1", "t2"], ["t4", "t5", "t6"]]
    assert alive == [0, 0, 1, 1, 2, 3, 3]  # a full file is written before the next tensor is asked for
    index = json.loads((tmp_path / INDEX).read_text())
    assert index["metadata"] == {"total_size": sum(sizes)}
    assert index["weight_map"]["t3"] == files[1].name
    assert len(index["weight_map"]) == len(sizes)


def test_an_earlier_write_is_replaced_and_a_failed_one_leaves_it(tmp_path: Path) -> None:
    tensors = {f"t{number}": torch.full((10,), float(number)) for number in range(4)}
    write_weights(tmp_path, tensors.items(), largest=40)
    before = contents(tmp_path)
    assert len(before) == 5

    def broken() -> Iterator[tuple[str, Tensor]]:
        yield from tensors.items()
        raise RuntimeError

    with pytest.raises(RuntimeError):
        write_weights(tmp_path, broken(), largest=40)
    assert contents(tmp_path) == before
    write_weights(tmp_path, tensors.items(), largest=80)
    assert {path.name for path in tmp_path.iterdir()} == {*(path.name for path in weights_files(tmp_path)), INDEX}
    write_weights(tmp_path, tensors.items())
    assert [path.name for path in tmp_path.iterdir()] == [WEIGHTS]
    write_weights(tmp_path, tensors.items(), largest=80)
    assert not (tmp_path / WEIGHTS).exists()
    (tmp_path / INDEX).unlink()
    remove_old(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FileFault, match=f"{WEIGHTS} does not exist"):
        weights_files(tmp_path)


def test_tensors_that_are_not_the_model_s_are_refused(tmp_path: Path) -> None:
    model = tiny("llama")[0]
    tensors = dict(model.state_dict())
    with pytest.raises(ValueError, match=r"LlamaForCausalLM has no tensor other"):
        save_parts(model, [*tensors.items(), ("other", torch.zeros(1))], tmp_path)
    name = next(reversed([name for name in tensors if "norm" in name]))
    del tensors[name]
    with pytest.raises(ValueError, match=f"1 tensors of LlamaForCausalLM are missing, e.g. {name}"):
        save_parts(model, tensors.items(), tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return in_parts("llama", tmp_path_factory.mktemp("sharded") / "checkpoint", LARGEST)


@pytest.fixture
def copied(sharded: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sharded, tmp_path / "copied"))


def shard(folder: Path, number: int = 2) -> Path:
    return weights_files(folder)[number - 1]


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def reindex(folder: Path, change: Callable[[str], str]) -> None:
    path = folder / INDEX
    document = json.loads(path.read_text())
    document["weight_map"] = {name: change(file) for name, file in document["weight_map"].items()}
    path.write_text(json.dumps(document))


def another(folder: Path) -> None:
    name = shard(folder).name
    shutil.copy(folder / name, folder / "other.safetensors")
    reindex(folder, lambda file: "other.safetensors" if file == name else file)


SECOND = r"model-00002-of-0000\d\.safetensors"
DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda folder: shard(folder).unlink(), f"{SECOND}(, which)? is missing"),
    "short": (lambda folder: shard(folder).write_bytes(shard(folder).read_bytes()[:-7]), f"{SECOND} is not the file"),
    "changed": (lambda folder: flip(shard(folder)), f"{SECOND} is not the file"),
    "added": (
        lambda folder: shutil.copy(shard(folder), folder / "model-00009-of-00009.safetensors"),
        r"model-00009-of-00009\.safetensors was added",
    ),
    "whole file added": (lambda folder: shutil.copy(shard(folder), folder / WEIGHTS), rf"{WEIGHTS} was added"),
    "swapped": (lambda folder: shutil.copy(shard(folder, 1), shard(folder)), f"{SECOND} is not the file"),
    "index of another file": (another, rf"({INDEX} is not the file|other\.safetensors was added)"),
    "index of another folder": (
        lambda folder: reindex(folder, lambda file: "../copied/" + file),
        rf"{INDEX} (names the file '\.\./copied/model|is not the file)",
    ),
    "index damaged": (lambda folder: (folder / INDEX).write_text("{"), f"{INDEX} is not JSON"),
    "index missing": (lambda folder: (folder / INDEX).unlink(), f"{WEIGHTS} does not exist"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_part_is_named_by_every_reader(copied: Path, damage: str) -> None:
    change, message = DAMAGES[damage]
    change(copied)
    with pytest.raises(CheckpointError, match=message):
        lbllm.load(copied)
    if damage.startswith("index ") and damage.endswith(("damaged", "missing")):
        with pytest.raises((OSError, ValueError)):  # transformers itself can't read it
            AutoModelForCausalLM.from_pretrained(copied)
    else:
        with pytest.raises(CheckpointError, match=message):
            AutoModelForCausalLM.from_pretrained(copied)
    (copied.parent / "published").mkdir()
    with pytest.raises(CheckpointError, match=message):
        copy_public(copied, read_record(copied), copied.parent / "published")
    if damage != "added":  # the file could belong to another model
        assert seal.main([str(copied)]) == 1


def test_parts_are_sealed_without_a_hash_for_old_readers_and_read_once(
    copied: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stated = json.loads((copied / "config.json").read_text())["quantization_config"]
    assert stated["tensors_sha256"] is None
    assert {name for name in stated["seal"]["files"] if "safetensors" in name} == {
        INDEX,
        *(path.name for path in weights_files(copied)),
    }
    hashed: list[str] = []

    def counted(file: Path) -> str:
        hashed.append(file.name)
        return file_sha256(file)

    monkeypatch.setattr(seal, "file_sha256", counted)
    lbllm.load(copied)
    assert len(hashed) == len(set(hashed))
    assert {path.name for path in weights_files(copied)} <= set(hashed)


def test_saved_again_in_place_in_more_files_or_fewer(copied: Path) -> None:
    for size in ("10KB", "10KB", "50GB", LARGEST):
        model, _ = lbllm.load(copied, dtype=torch.bfloat16)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.save_pretrained(copied, max_shard_size=size)
        assert (copied / WEIGHTS).exists() == (size == "50GB")
        for name, tensor in lbllm.load(copied, dtype=torch.bfloat16)[0].state_dict().items():
            assert torch.equal(tensor, before[name])


def test_a_template_is_sealed_again_with_several_files(copied: Path) -> None:
    path = copied / "chat_template.jinja"
    path.write_text(path.read_text() + " ")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not the file"):
        lbllm.load(copied)
    assert seal.main([str(copied)]) == 0
    lbllm.load(copied)
