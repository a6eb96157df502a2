"""A GGUF file is read whole or not at all: all parts, tensors and settings; nothing beside it counts."""

from __future__ import annotations

import copy
import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from transformers import PreTrainedModel

from lbllm.errors import ModelError
from lbllm.models.teacher import load_teacher, skeleton
from lbllm.places import home
from lbllm.share.gguf import write_gguf as export_gguf
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import tiny
from tests.helpers.tiny_runs import token_ids


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=1)).logits


def rewritten(
    file: Path,
    target: Path,
    keep: Callable[[str], bool] = lambda name: True,
    settings: dict[str, Any] | None = None,
    more: dict[str, np.ndarray] | None = None,
    fields: bool = True,
) -> Path:
    """A copy of a GGUF file with some of its tensors, and more settings and tensors."""
    reader = gguf.GGUFReader(file)
    writer = gguf.GGUFWriter(target, "llama")
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in (settings or {}) or not fields:
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), kind, sub_type=inner)
    for name, value in (settings or {}).items():
        kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32, str: gguf.GGUFValueType.STRING}
        writer.add_key_value(name, value, kinds[type(value)])
    for tensor in reader.tensors:
        if keep(tensor.name):
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, value in (more or {}).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target


def split(folder: Path, cut: int = 11) -> tuple[list[Path], PreTrainedModel]:
    """A tiny model in two files, and the model."""
    folder.mkdir()
    whole = folder / "whole.gguf"
    model = write_gguf(whole)
    names = [tensor.name for tensor in gguf.GGUFReader(whole).tensors]
    parts = [folder / f"m-0000{number}-of-00002.gguf" for number in (1, 2)]
    for number, (part, chosen) in enumerate(zip(parts, (names[:cut], names[cut:]), strict=True)):
        stated = {"split.no": number, "split.count": 2, "split.tensors.count": len(names)}
        rewritten(whole, part, chosen.__contains__, stated, fields=number == 0)
    whole.unlink()
    return parts, model


def test_all_parts_of_a_split_file_are_read(tmp_path: Path) -> None:
    parts, model = split(tmp_path / "both")
    (parts[0].parent / "tokenizer_config.json").write_text('{"auto_map": {"AutoTokenizer": ["a.B", null]}}')
    for part in parts:
        teacher = load_teacher(str(part))
        torch.testing.assert_close(logits(teacher.model), logits(model))
        assert teacher.precision.startswith("dequantized Q8_0")
    assert skeleton(str(parts[1])).num_parameters() == model.num_parameters()
    (made,) = [path for path in (home() / "models").iterdir() if path.is_dir()]
    assert made.name.startswith("m-")
    assert not list(made.glob("*.gguf"))


def test_a_part_alone_is_refused_by_name(tmp_path: Path) -> None:
    parts, _ = split(tmp_path / "both")
    parts[1].rename(tmp_path / "away.gguf")
    for look in (load_teacher, skeleton):
        with pytest.raises(ModelError, match=r"one of 2 parts, and m-00002-of-00002\.gguf is missing"):
            look(str(parts[0]))
    shutil.copy(parts[0], parts[1])
    with pytest.raises(ModelError, match=r"says that it is part 0 of 2"):
        load_teacher(str(parts[0]))
    renamed = Path(shutil.copy(parts[0], tmp_path / "model.gguf"))
    with pytest.raises(ModelError, match=r"one of 2 parts of a model, but its name does not say which"):
        load_teacher(str(renamed))
    assert not any(path.is_dir() for path in (home() / "models").iterdir())


@pytest.mark.parametrize(
    "lost", ["blk.1.ffn_down.weight", "output_norm.weight", "blk.0.attn_q.weight", "token_embd.weight"]
)
def test_a_missing_tensor_is_an_error(lost: str, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    file = rewritten(tmp_path / "whole.gguf", tmp_path / "m.gguf", lambda name: name != lost)
    with pytest.raises(ModelError, match=r"weights are missing|can't be converted"):
        load_teacher(str(file))


def test_a_tensor_without_a_place_is_an_error(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    more = {"blk.0.attn_q_norm.weight": np.ones(16, np.float32)}
    file = rewritten(tmp_path / "whole.gguf", tmp_path / "m.gguf", more=more)
    with pytest.raises(
        ModelError, match=r"1 of its \d+ tensors have no place in a llama model, e\.g\. blk\.0\.attn_q_norm"
    ):
        load_teacher(str(file))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0}},
        {"num_key_value_heads": 4, "tie_word_embeddings": True},
    ],
    ids=["biases", "scaled", "tied"],
)
def test_biases_and_scaled_frequencies_are_read(changes: dict[str, Any], tmp_path: Path) -> None:
    if "rope_parameters" in changes:
        changes["rope_parameters"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}
    model, tokenizer = tiny("llama_bias", **changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    export_gguf(copy.deepcopy(model).bfloat16(), tokenizer, tmp_path / "m.gguf", name="m", licence=None)
    read = load_teacher(str(tmp_path / "m.gguf")).model
    torch.testing.assert_close(logits(read), logits(model), rtol=1e-4, atol=1e-4)


def test_other_frequencies_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    factors = np.linspace(1, 3, 8, dtype=np.float32)
    file = rewritten(tmp_path / "whole.gguf", tmp_path / "m.gguf", more={"rope_freqs.weight": factors})
    with pytest.raises(ModelError, match=r"rotary frequencies"):
        load_teacher(str(file))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope.scaling.type", "linear"),
        ("rope.scaling.factor", 8.0),
        ("rope.dimension_count", 4),
        ("logit_scale", 0.25),
        ("attention.key_length", 24),
        ("attention.sliding_window", 16),
        ("block_count", 10**9),
        ("expert_count", 4),
    ],
)
def test_a_setting_that_is_not_read_is_an_error(key: str, value: Any, tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    file = rewritten(tmp_path / "whole.gguf", tmp_path / "m.gguf", settings={f"llama.{key}": value})
    with pytest.raises(ModelError, match=rf"m\.gguf.*({key}|shape)"):
        load_teacher(str(file))


def test_settings_that_change_nothing_are_read(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    same = {"llama.rope.scaling.type": "none", "llama.expert_count": 0, "llama.attention.key_length": 16}
    file = rewritten(tmp_path / "whole.gguf", tmp_path / "m.gguf", settings=same)
    assert load_teacher(str(file)).model.config.head_dim == 16


def test_a_conversion_made_without_these_checks_is_not_used(tmp_path: Path, own_home: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    load_teacher(str(tmp_path / "m.gguf"))
    (made,) = [path for path in (own_home / "models").iterdir() if path.is_dir()]
    assert json.loads((made / "source.json").read_text())["conversion"] == 2
    old = made.rename(made.with_name(made.name.rpartition("-")[0]))
    (old / "config.json").write_text("{}")
    torch.testing.assert_close(logits(load_teacher(str(tmp_path / "m.gguf")).model), logits(model))


def test_a_conversion_that_was_damaged_is_made_anew(tmp_path: Path, own_home: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    load_teacher(str(tmp_path / "m.gguf"))
    (made,) = [path for path in (own_home / "models").iterdir() if path.is_dir()]
    for name in sorted(path.name for path in made.iterdir()):
        data = bytearray((made / name).read_bytes())
        data[len(data) // 2] ^= 4
        (made / name).write_bytes(data)
        torch.testing.assert_close(logits(load_teacher(str(tmp_path / "m.gguf")).model), logits(model))
        assert (made / name).read_bytes() != data
        (made / name).unlink()
        torch.testing.assert_close(logits(load_teacher(str(tmp_path / "m.gguf")).model), logits(model))
    (made / "generation_config.json").write_text('{"eos_token_id": 7}')
    assert load_teacher(str(tmp_path / "m.gguf")).model.generation_config.eos_token_id != 7


def test_files_beside_it_do_not_count(tmp_path: Path) -> None:
    model = write_gguf(tmp_path / "m.gguf")
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "auto_map": {"AutoConfig": "code.C"}}')
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "generation_config.json").write_text("[]")
    torch.testing.assert_close(logits(load_teacher(str(tmp_path / "m.gguf")).model), logits(model))


def test_a_cut_file_of_any_length_is_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "whole.gguf")
    data = (tmp_path / "whole.gguf").read_bytes()
    file = tmp_path / "m.gguf"
    for size in (0, 3, 8, 24, 100, 2_000, len(data) - 40_000, len(data) - 64):
        file.write_bytes(data[:size])
        with pytest.raises(ModelError, match=r"m\.gguf"):
            load_teacher(str(file))
    file.write_bytes(data[:8] + struct.pack("<QQ", 2**62, 2**62) + data[24:])
    with pytest.raises(ModelError, match=r"m\.gguf"):
        load_teacher(str(file))
