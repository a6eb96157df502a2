"""The seal: whatever file of a checkpoint changes the answers, every reader notices when it has changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm
from lbllm.checkpoints import seal
from lbllm.checkpoints.record import copy_public, read_record
from lbllm.checkpoints.seal import is_sealed
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.errors import CheckpointError
from lbllm.files import file_sha256
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

SECOND = "{% for message in messages %}second {{ message.content }}{% endfor %}"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run's checkpoint whose tokenizer has two chat templates."""
    folder, teacher = tmp_path_factory.mktemp("seal"), tiny_teacher("llama")
    teacher.tokenizer.chat_template = {"default": teacher.tokenizer.chat_template, "second": SECOND}
    run_tiny(run_config(), folder, teacher)
    return folder / "checkpoint"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


def from_pretrained(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder)


def published(folder: Path) -> None:
    target = folder.parent / "published"
    target.mkdir(exist_ok=True)
    copy_public(folder, read_record(folder), target)


def changed(folder: Path, *keys: str, value: object) -> None:
    """Set one value of config.json; ``keys`` lead to it."""
    path = folder / "config.json"
    document = inner = json.loads(path.read_text())
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = value
    path.write_text(json.dumps(document))


def test_every_flipped_byte_of_the_weights_is_refused_by_both_readers(copied: Path) -> None:
    path = copied / WEIGHTS
    whole = path.read_bytes()
    header = int.from_bytes(whole[:8], "little") + 8
    places = [0, 7, 8, 40, *range(9, header, header // 12), *range(header, len(whole), (len(whole) - header) // 40)]
    for place in [*places, len(whole) - 1]:
        data = bytearray(whole)
        data[place] ^= 1 << place % 8
        path.write_bytes(bytes(data))
        with pytest.raises(CheckpointError, match="is not the file that was saved"):
            lbllm.load(copied)
        with pytest.raises(Exception) as caught:  # noqa: PT011 - a broken header is refused by safetensors itself
            from_pretrained(copied)
        if place >= header:
            assert isinstance(caught.value, CheckpointError)
            assert "is not the file that was saved" in str(caught.value)


SETTINGS: dict[str, tuple[tuple[str, ...], object]] = {
    "epsilon": (("rms_norm_eps",), 1e-3),
    "activation": (("hidden_act",), "gelu"),
    "rope": (("rope_parameters", "rope_theta"), 500.0),
    "tied": (("tie_word_embeddings",), False),
    "heads": (("num_key_value_heads",), 4),
    "file": (("transformers_weights",), "other.safetensors"),
    "code": (("auto_map",), {"AutoModelForCausalLM": "code.Model"}),
    "seal": (("quantization_config", "seal", "files", WEIGHTS, "size"), 1),
    "damaged seal": (("quantization_config", "seal", "files"), []),
    "newer seal": (("quantization_config", "seal", "version"), 2),
    "seal of another kind": (("quantization_config", "seal"), "x"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_changed_setting_is_refused_by_both_readers(copied: Path, setting: str) -> None:
    keys, value = SETTINGS[setting]
    changed(copied, *keys, value=value)
    with pytest.raises(CheckpointError, match=f"{copied}.*again"):
        lbllm.load(copied)
    with pytest.raises((CheckpointError, OSError)):  # a weights file that is not there
        from_pretrained(copied)


def appended(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text((folder / name).read_text() + " ")


def added(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text("{}")


FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "template": (appended("chat_template.jinja"), "chat_template.jinja is not the file"),
    "second template": (appended("additional_chat_templates/second.jinja"), r"second\.jinja is not the file"),
    "tokenizer": (appended("tokenizer.json"), "tokenizer.json is not the file"),
    "tokenizer settings": (appended("tokenizer_config.json"), "tokenizer_config.json is not the file"),
    "generation": (appended("generation_config.json"), "generation_config.json is not the file"),
    "no template": (lambda folder: (folder / "chat_template.jinja").unlink(), "chat_template.jinja is missing"),
    "no generation": (lambda folder: (folder / "generation_config.json").unlink(), "generation_config.json is missing"),
    "third template": (added("additional_chat_templates/third.jinja"), r"third\.jinja was added"),
    "tokens": (added("added_tokens.json"), "added_tokens.json was added"),
    "index": (added("model.safetensors.index.json"), "model.safetensors.index.json was added"),
    "adapter": (added("adapter_config.json"), "adapter_config.json was added"),
}


@pytest.mark.parametrize("file", FILES)
def test_a_changed_file_is_refused_until_it_is_sealed_again(
    copied: Path, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change, message = FILES[file]
    change(copied)
    for read in (lbllm.load, published):
        with pytest.raises(CheckpointError, match=f"{message}.*lbllm.checkpoints.seal {copied}"):
            read(copied)
    assert seal.main([str(copied)]) == 0
    published(copied)
    assert capsys.readouterr() == ("", "")


def test_weights_are_not_sealed_again(copied: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = bytearray((copied / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copied / WEIGHTS).write_bytes(data)
    assert seal.main([str(copied)]) == 1
    assert f"{copied / WEIGHTS} is not the file that was saved" in capsys.readouterr().err
    for folder in (tmp_path / "nowhere", tmp_path):
        assert seal.main([str(folder)]) == 1
        assert str(folder) in capsys.readouterr().err


def test_notes_beside_a_checkpoint_and_its_origin_are_free(copied: Path) -> None:
    (copied / "notes.txt").write_text("mine")
    (copied / "README.md").write_text("other")
    changed(copied, "quantization_config", "provenance", "model", value="other")
    lbllm.load(copied)


def test_what_is_saved_again_is_sealed_with_its_tokenizer(copied: Path, tmp_path: Path) -> None:
    model, tokenizer = lbllm.load(copied)
    tokenizer.add_tokens(["<|more|>"])
    model.resize_token_embeddings(len(tokenizer))
    for folder in (copied, tmp_path / "new"):
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert is_sealed(folder)
        assert len(lbllm.load(folder)[1]) == len(tokenizer)
        path = folder / "chat_template.jinja"
        path.write_text(path.read_text() + " ")
        with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not the file"):
            lbllm.load(folder)
        path.write_text(path.read_text()[:-1])
    # A tokenizer that comes from elsewhere to a checkpoint saved without one.
    model.save_pretrained(tmp_path / "alone")
    AutoTokenizer.from_pretrained(copied).save_pretrained(tmp_path / "alone")
    lbllm.load(tmp_path / "alone")


def test_a_checkpoint_without_a_seal_is_checked_as_before(copied: Path) -> None:
    document = json.loads((copied / "config.json").read_text())
    del document["quantization_config"]["seal"]
    (copied / "config.json").write_text(json.dumps(document))
    assert not is_sealed(copied)
    with torch.no_grad():
        first, second = (
            model(torch.arange(3, 9)[None]).logits for model in (lbllm.load(copied)[0], from_pretrained(copied))
        )
    assert first.shape == second.shape
    data = bytearray((copied / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (copied / WEIGHTS).write_bytes(data)
    for read in (lbllm.load, from_pretrained):
        with pytest.raises(CheckpointError, match="is not the file that was saved"):
            read(copied)


def test_the_weights_are_read_once_to_be_checked(copied: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    once = file_sha256

    def counted(file: Path) -> str:
        hashed.append(file.name)
        return once(file)

    monkeypatch.setattr(seal, "file_sha256", counted)
    lbllm.load(copied)
    assert hashed.count(WEIGHTS) == 1
    assert len(hashed) == len(set(hashed))


@pytest.mark.parametrize("key", ["vocab_file", "tokenizer_file", "gguf_file", "vocab"])
def test_a_path_in_the_tokenizer_s_settings_is_refused(copied: Path, key: str) -> None:
    path = copied / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: "../outside/vocab.txt"}))
    seal.main([str(copied)])
    with pytest.raises(CheckpointError, match=f"{key} names the file '../outside/vocab.txt'"):
        lbllm.load(copied)
