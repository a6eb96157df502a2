"""Opening a checkpoint beside its teacher, addresses, overviews, and everything that can't be shown."""

from __future__ import annotations

import json
import shutil
import threading
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

import lbllm
from benchmarks.architectures import tiny_of
from lbllm.checkpoints.seal import add_seal, format_sha256, weights_sha256
from lbllm.errors import CheckpointError, ConfigError, LbllmError, ModelError
from lbllm.files import file_sha256
from lbllm.microscope.address import Address
from lbllm.microscope.microscope import KEPT, Microscope
from lbllm.microscope.overview import METRICS
from lbllm.models.streamed import Rows
from lbllm.models.weights import StoredWeights
from lbllm.quant.packed_layer import PackedLinear
from lbllm.quant.plan import layer_bits
from lbllm.sections import LayerOverride, QuantConfig
from tests.helpers.tiny_models import save_tiny, tiny, tiny_tokenizer
from tests.helpers.tiny_packed import checkpoint_of, tiny_checkpoint

QUANT = QuantConfig(
    group_size=16, skip=("*.1.mlp.up_proj",), overrides={"*.down_proj": LayerOverride(format="w1", group_size=30)}
)


class Made(NamedTuple):
    folder: Path
    teacher: Path
    microscope: Microscope


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    folder, teacher = tiny_checkpoint(tmp_path_factory.mktemp("scope"), "llama", QUANT)
    return Made(folder, teacher, Microscope.open(str(folder), str(teacher)))


@pytest.fixture
def copied(made: Made, tmp_path: Path) -> Made:
    """A checkpoint and a teacher of the test's own."""
    folder = Path(shutil.copytree(made.folder, tmp_path / "packed"))
    teacher = Path(shutil.copytree(made.teacher, tmp_path / "teacher"))
    return Made(folder, teacher, Microscope.open(str(folder), str(teacher)))


def test_what_is_known_of_the_pair(made: Made) -> None:
    found = made.microscope
    assert (found.title, found.teacher_title, found.precision, found.blocks) == ("packed", "teacher", "float32", 2)
    assert found.fingerprint == file_sha256(made.folder / "model.safetensors")
    assert found.config.format == QUANT
    assert found.latent_words == ""
    assert "fit_levels" in found.before_words
    names = [
        *(f"self_attn.{letter}_proj" for letter in "qkvo"),
        *(f"mlp.{name}_proj" for name in ("gate", "up", "down")),
    ]
    assert found.layers == names
    for block in (0, 1):
        for name in names:
            assert found.formats[block][name] == QUANT.layer(f"{found.path}.{block}.{name}")
    assert found.formats[1]["mlp.up_proj"] is None
    model = tiny("llama")[0]
    assert found.shapes[1]["mlp.down_proj"] == model.get_parameter("model.layers.1.mlp.down_proj.weight").shape


def test_several_files_have_one_fingerprint(tmp_path: Path) -> None:
    folder, teacher = tiny_checkpoint(tmp_path, "llama", QuantConfig(group_size=16), largest=20_000)
    found = Microscope.open(str(folder), str(teacher))
    assert len(weights_sha256(folder)) > 3
    assert len(found.fingerprint) == 64
    assert len({found.layer(place).group(3, 1).signs[0].file for place in ("0/mlp.up_proj", "1/mlp.up_proj")}) == 2


def test_layers_whose_names_in_files_are_others(tmp_path: Path) -> None:
    """Blocks that differ from each other, too: one has attention, one a state-space layer."""
    folder, teacher = checkpoint_of(
        tmp_path, tiny_of("nemotron_h"), tiny_tokenizer(chat=False), QuantConfig(group_size=16)
    )
    found = Microscope.open(str(folder), str(teacher))
    assert all(name.startswith("backbone.") for name in weights_of(folder) if name.endswith(".params"))
    rows, model = found.overview("error").values, lbllm.load(folder)[0]
    for block, row in enumerate(rows):
        for name, value in zip(found.layers, row, strict=True):
            assert (value is None) == (name not in found.shapes[block])
            if value is not None:
                layer = found.layer(Address(block, name))
                packed = model.get_submodule(layer.name)
                assert isinstance(packed, PackedLinear)
                assert torch.equal(layer.rebuilt, packed.dequantize())
                assert len(layer.group(1, 0).signs) == 16
    assert {None} < {value for row in rows for value in row}


def weights_of(folder: Path) -> set[str]:
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def test_of_the_teacher_only_the_layer_is_read(copied: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []

    def noted(weights: StoredWeights, name: str, rows: Rows | None = None) -> torch.Tensor:
        read.append(name)
        return own(weights, name, rows)

    own = StoredWeights.read
    monkeypatch.setattr(StoredWeights, "read", noted)
    weight = copied.microscope.original("0/mlp.up_proj")
    assert read == ["model.layers.0.mlp.up_proj.weight"]
    assert torch.equal(weight, tiny("llama")[0].get_parameter("model.layers.0.mlp.up_proj.weight"))


def test_a_dense_layer_still_has_its_teacher_s_weight(made: Made) -> None:
    weight = made.microscope.original("1/mlp.up_proj")
    assert torch.equal(weight, tiny("llama")[0].get_parameter("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj is dense in packed.*, for example 1/self_attn"):
        made.microscope.layer("1/mlp.up_proj")
    with pytest.raises(ModelError, match="is dense"):
        made.microscope.check("1/mlp.up_proj/3/0")


@pytest.mark.parametrize("metric", METRICS)
def test_a_map_has_the_figure_of_every_layer(made: Made, metric: str) -> None:
    found = made.microscope
    overview = found.overview(metric)  # type: ignore[arg-type]
    grown: list[tuple[float | None, ...]] = []
    for block, row in overview:
        assert block == len(grown)
        grown.append(row)
    assert overview.values == grown
    for block in (0, 1):
        for name, value in zip(found.layers, grown[block], strict=True):
            fmt = found.formats[block][name]
            if fmt is None or (metric == "bitmap" and fmt.format == "w1"):
                assert value is None
                continue
            layer = found.layer(Address(block, name))
            wanted = {
                "error": layer.error,
                "signs": layer.sign_flips,
                "bitmap": layer.bitmap_flips,
                "bits": layer_bits(fmt, *layer.shape) / (layer.shape[0] * layer.shape[1]),
            }[metric]
            assert value == wanted
            assert isinstance(value, float)
            assert value > 0
    named = METRICS[metric].function.rpartition(".")  # type: ignore[index]
    assert hasattr(__import__(named[0], fromlist=[named[2]]), named[2])
    assert ("fit_levels" in overview.about) == (metric in ("signs", "bitmap"))


def test_a_map_of_something_else_is_refused(made: Made) -> None:
    with pytest.raises(ConfigError, match="no map of heat; choose one of error, signs, bitmap, bits"):
        made.microscope.overview("heat")  # type: ignore[arg-type]


@pytest.mark.parametrize("address", ["", "1", "1/mlp.down_proj", "1/mlp.down_proj/47", "1/mlp.down_proj/47/2"])
def test_addresses_that_lead_somewhere(made: Made, address: str) -> None:
    assert str(made.microscope.check(address)) == address


@pytest.mark.parametrize(
    ("address", "reason"),
    [
        ("2", "there is no block 2 in packed: addresses count its blocks from 0 to 1"),
        ("0/mlp.up", r"block 0 of packed has no layer mlp\.up; its layers are self_attn\.q_proj, .*mlp\.down_proj"),
        ("0/mlp.up_proj/90", "0/mlp.up_proj has the rows 0 to 89; there is no row 90"),
        ("0/mlp.up_proj/89/3", "a row of 0/mlp.up_proj has the groups 0 to 2; there is no group 3"),
        ("nowhere", "'nowhere' is not an address"),
    ],
)
def test_addresses_that_are_no_more(made: Made, address: str, reason: str) -> None:
    for asked in (made.microscope.check, made.microscope.layer):
        with pytest.raises(ConfigError, match=reason):
            asked(address)


def test_a_block_alone_is_no_layer(made: Made) -> None:
    with pytest.raises(ConfigError, match="1 has no layer; add one, for example"):
        made.microscope.layer("1")
    with pytest.raises(ConfigError, match="this address has no layer"):
        made.microscope.layer("")


def test_only_the_last_layers_are_kept(made: Made) -> None:
    found, name = made.microscope, "0/self_attn.q_proj"
    first = found.layer(name)
    assert found.layer(f"{name}/3/1") is first
    for other in found.layers[1 : KEPT + 1]:
        found.layer(f"0/{other}")
    again = found.layer(name)
    assert again is not first
    assert torch.equal(again.rebuilt, first.rebuilt)


def test_threads_share_a_microscope(copied: Made) -> None:
    """Each of them finds what a single one does."""
    places = [f"0/{name}" for name in copied.microscope.layers] * 3
    wanted = {place: copied.microscope.layer(place).error for place in places}
    found: list[tuple[str, float]] = []
    fresh = Microscope.open(str(copied.folder), str(copied.teacher))

    def work(part: list[str]) -> None:
        found.extend((place, fresh.layer(place).error) for place in part)

    threads = [threading.Thread(target=work, args=(places[number::3],)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(places)
    assert all(wanted[place] == error for place, error in found)


def test_a_checkpoint_that_is_deleted_while_it_is_looked_at(copied: Made) -> None:
    layer = copied.microscope.layer("0/mlp.up_proj")
    shutil.rmtree(copied.folder)
    for asked in (
        lambda: copied.microscope.layer("0/mlp.up_proj"),
        lambda: copied.microscope.layer("0/mlp.gate_proj"),
        lambda: copied.microscope.overview("error").values,
        lambda: layer.group(0, 0),
    ):
        with pytest.raises(CheckpointError, match=r"model\.safetensors is missing.*open the checkpoint again"):
            asked()


def test_a_checkpoint_that_changes_while_it_is_looked_at(copied: Made) -> None:
    layer = copied.microscope.layer("0/mlp.up_proj")
    file = copied.folder / "model.safetensors"
    file.write_bytes(file.read_bytes() + b"more")
    for asked in (lambda: copied.microscope.layer("0/mlp.up_proj"), lambda: layer.group(0, 0)):
        with pytest.raises(CheckpointError, match=r"model\.safetensors has changed"):
            asked()


def test_a_teacher_that_is_deleted_while_it_is_looked_at(copied: Made) -> None:
    shutil.rmtree(copied.teacher)
    layer = copied.microscope.layer("0/mlp.up_proj")
    assert layer.rebuilt.shape == layer.shape  # the bits need no teacher
    with pytest.raises(ModelError, match=r"model\.safetensors is missing.*put the file back and try again"):
        _ = layer.original


@pytest.mark.parametrize(
    ("architecture", "changes", "reason"),
    [
        ("llama", {"seed": 1}, "embed_tokens.weight differs"),
        ("llama", {"num_hidden_layers": 1}, r"the model has no layer for model\.layers\.1\."),
        ("llama", {"num_hidden_layers": 3}, r"layers\.2\..* would have the shape .*, but there is no such tensor"),
        (
            "llama",
            {"intermediate_size": 96},
            r"mlp\.gate_proj\.weight would have the shape \(96, 2, 6\), but has \(90, 2, 6\)",
        ),
        ("gpt2", {}, "no such tensor"),
        ("qwen3_moe", {}, "no such tensor"),
    ],
)
def test_another_teacher_is_named(
    made: Made, tmp_path: Path, architecture: str, changes: dict[str, int], reason: str
) -> None:
    other = save_tiny(tmp_path / "other", architecture, **changes)
    with pytest.raises(ModelError, match=f"packed was not made from .*other: .*(?:{reason}).*give the model") as error:
        Microscope.open(str(made.folder), str(other))
    assert "\n" not in str(error.value)


def test_a_checkpoint_that_names_no_teacher_that_is_here(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="A path in a checkpoint is not followed"):
        Microscope.open(str(made.folder))
    with pytest.raises(LbllmError, match="nowhere"):
        Microscope.open(str(made.folder), str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        Microscope.open(str(made.teacher), str(made.teacher))
    with pytest.raises(ModelError, match="already quantized"):
        Microscope.open(str(made.folder), str(made.folder))


def test_a_damaged_checkpoint_is_not_opened(copied: Made) -> None:
    file = copied.folder / "model.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"model\.safetensors is not the file that was saved"):
        Microscope.open(str(copied.folder), str(copied.teacher))
    file.unlink()
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not exist"):
        Microscope.open(str(copied.folder), str(copied.teacher))


def test_a_newer_layout_is_refused(copied: Made) -> None:
    path = copied.folder / "config.json"
    document = json.loads(path.read_text())
    document["quantization_config"]["version"] = 2
    path.write_text(json.dumps(document))
    with pytest.raises(CheckpointError, match="layout version 2"):
        Microscope.open(str(copied.folder), str(copied.teacher))


def resealed(folder: Path, **quant: object) -> None:
    """Seal a checkpoint as a program that writes these files would, with more settings in its format."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    stated = document["quantization_config"]
    stated["quant"] |= quant
    stated["format_sha256"] = format_sha256(stated["quant"])
    add_seal(document, folder)
    path.write_text(json.dumps(document))


def test_a_format_with_a_setting_of_a_later_version_is_refused(copied: Made) -> None:
    resealed(copied.folder, sparsity=0.5)
    with pytest.raises(CheckpointError, match=r"setting quant\.sparsity can't be read"):
        Microscope.open(str(copied.folder), str(copied.teacher))


def test_tensors_of_another_type_are_refused(copied: Made) -> None:
    file = copied.folder / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.down_proj.weight"] = tensors["model.layers.1.mlp.down_proj.weight"].to(torch.int32)
    save_file(tensors, file, metadata={"format": "pt"})
    resealed(copied.folder)
    with pytest.raises(CheckpointError, match=r"down_proj\.weight is of type torch\.int32, not torch\.uint8"):
        Microscope.open(str(copied.folder), str(copied.teacher))
