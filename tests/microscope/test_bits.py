"""The bits and bytes that the microscope shows are those of the file, read here without any code of the project."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import lbllm
from lbllm.microscope.layer import LayerView
from lbllm.microscope.microscope import Microscope
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerOverride, QuantConfig
from tests.helpers.tiny_packed import tiny_checkpoint

# Rows of 48 and 90 weights: groups of 20 and 32 leave shorter last ones, 90 no whole number of bytes.
FORMATS: dict[str, tuple[str, QuantConfig]] = {
    "w1+1, 16 bits, shorter last groups": ("llama", QuantConfig(group_size=20, param_bits=16, act_bits=16)),
    "w1+1, 8 bits, shorter last groups": ("llama_bias", QuantConfig(group_size=32, param_bits=8)),
    "w1+1, 4 bits": ("llama", QuantConfig(group_size=16, param_bits=4, act_group_size=16)),
    "w1, 16 bits": ("qwen3", QuantConfig(format="w1", group_size=16)),
    "w1, 8 bits, whole rows": ("llama", QuantConfig(format="w1", group_size=-1, param_bits=8, act_bits=8)),
    "w1, 4 bits": ("llama", QuantConfig(format="w1", group_size=20, param_bits=4)),
    "w1+1, whole rows": ("gpt2", QuantConfig(group_size=-1, param_bits=4)),
    "transposed layers": ("gpt2", QuantConfig(group_size=20, act_bits=16)),
    "other formats for some": (
        "gemma3",
        QuantConfig(
            group_size=16,
            skip=("*.k_proj", "*.0.mlp.up_proj"),
            overrides={"*.down_proj": LayerOverride(format="w1", group_size=30, param_bits=8, act_bits=8)},
        ),
    ),
}


@dataclass(frozen=True)
class Made:
    folder: Path
    microscope: Microscope
    layers: dict[str, LayerView]


@pytest.fixture(scope="module", params=FORMATS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Made:
    architecture, quant = FORMATS[request.param]
    folder, teacher = tiny_checkpoint(tmp_path_factory.mktemp("bits"), architecture, quant, largest=50_000)
    microscope = Microscope.open(str(folder), str(teacher))
    places = [
        f"{number}/{name}"
        for number, of_block in enumerate(microscope.formats)
        for name, fmt in of_block.items()
        if fmt is not None
    ]
    some = {*places[:2], *places[2::3], places[-1]}
    return Made(folder, microscope, {place: microscope.layer(place) for place in sorted(some)})


def header(file: Path) -> tuple[dict[str, dict[str, list[int]]], int]:
    """The table of a safetensors file, and where its tensors begin."""
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)), 8 + length


def raw(folder: Path, name: str) -> tuple[Path, int, bytes, list[int]]:
    """File, first byte, bytes and shape of a tensor."""
    for file in folder.glob("*.safetensors"):
        table, start = header(file)
        if name in table:
            begin, end = table[name]["data_offsets"]
            return file, start + begin, file.read_bytes()[start + begin : start + end], table[name]["shape"]
    raise AssertionError(name)


def half(data: bytes, number: int) -> float:
    return float(struct.unpack_from("<e", data, 2 * number)[0])


def test_every_bit_is_that_of_the_file(made: Made) -> None:
    for layer in made.layers.values():
        file, start, data, (rows, planes, row_bytes) = raw(made.folder, f"{layer.name}.weight")
        assert planes == layer.count // 2
        for row in (0, 1, rows - 1):
            for number in {0, layer.groups - 1}:
                group = layer.group(row, number)
                for plane, bits in enumerate((group.signs, group.bitmap)[:planes]):
                    assert len(bits) == group.columns.stop - group.columns.start == len(group.weights)
                    for column, bit in zip(range(group.columns.start, group.columns.stop), bits, strict=True):
                        offset = (row * planes + plane) * row_bytes + column // 8
                        assert (bit.file, bit.offset, bit.bit) == (file.name, start + offset, column % 8)
                        assert bit.byte == data[offset]
                        assert bit.value == bool(data[offset] >> (column % 8) & 1)
                        whole = layer.sign if plane == 0 else layer.bitmap
                        assert whole is not None
                        assert bool(whole[row, column]) == bit.value
                assert (planes == 2) or (group.bitmap == () and layer.bitmap is None)


def test_every_parameter_is_that_of_the_file(made: Made) -> None:
    for layer in made.layers.values():
        fmt, count = layer.fmt, layer.count
        file, start, data, _ = raw(made.folder, f"{layer.name}.params")
        scale = raw(made.folder, f"{layer.name}.params_scale")[2] if fmt.param_bits < 16 else b""
        ranges = raw(made.folder, f"{layer.name}.params_range")[2] if fmt.param_bits == 4 else b""
        for row in (0, layer.shape[0] - 1):
            for number in {0, layer.groups - 1}:
                group = layer.group(row, number)
                assert [one.name for one in group.params] == ["alpha_0", "mu_0", "alpha_1", "mu_1"][:count]
                for k, one in enumerate(group.params):
                    place = (row * layer.groups + number) * count + k
                    assert one.bits == fmt.param_bits
                    if fmt.param_bits == 16:
                        offset, held, value = 2 * place, data[2 * place : 2 * place + 2], half(data, place)
                        assert (one.code, one.bit) == (int.from_bytes(held, "little"), 0)
                        assert (one.minimum, one.step) == (None, None)
                    elif fmt.param_bits == 8:
                        offset, held = place, data[place : place + 1]
                        low, step = (half(scale, (row * count + k) * 2 + end) for end in (0, 1))
                        value = low + held[0] * step
                        assert (one.code, one.bit, one.minimum, one.step) == (held[0], 0, low, step)
                    else:
                        offset, held = place // 2, data[place // 2 : place // 2 + 1]
                        code = held[0] >> 4 if place % 2 else held[0] & 15
                        low, step = (half(scale, row) * half(ranges, 2 * k + end) for end in (0, 1))
                        assert (one.code, one.bit) == (code, 4 * (place % 2))
                        assert one.minimum == pytest.approx(low, rel=1e-3, abs=1e-6)
                        assert one.step == pytest.approx(step, rel=1e-3, abs=1e-6)
                        assert one.minimum is not None
                        assert one.step is not None
                        value = one.minimum + code * one.step
                    assert (one.file, one.offset, one.data) == (file.name, start + offset, held)
                    assert one.value == pytest.approx(value, rel=1e-6, abs=1e-9)


def test_weights_follow_from_bits_and_parameters(made: Made) -> None:
    """The equation of the paper in Python's own float64."""
    for layer in made.layers.values():
        row = layer.shape[0] // 2
        for number in range(layer.groups):
            group = layer.group(row, number)
            values = {one.name: one.value for one in group.params}
            for place, sign in enumerate(group.signs):
                outer = not group.bitmap or group.bitmap[place].value
                pair = "0" if outer else "1"
                wanted = values[f"mu_{pair}"] + (1 if sign.value else -1) * values[f"alpha_{pair}"]
                column = group.columns.start + place
                assert math.isclose(group.rebuilt[place].item(), wanted, rel_tol=1e-6, abs_tol=1e-7)
                assert layer.rebuilt[row, column] == group.rebuilt[place]
                assert group.weights[place] == layer.original[row, column]
                assert group.levels[int(group.index[place])] == group.rebuilt[place]


def test_layers_are_those_of_the_loaded_models(made: Made) -> None:
    model = lbllm.load(made.folder)[0]
    teacher = made.microscope
    for place, layer in made.layers.items():
        packed = model.get_submodule(layer.name)
        assert isinstance(packed, PackedLinear)
        assert torch.equal(layer.rebuilt, packed.dequantize())
        assert torch.equal(layer.index, packed.unpack()[0])
        assert layer.fmt == packed.fmt
        assert (layer.quantizer is None) == (packed.quantizer is None)
        if layer.quantizer is not None and packed.quantizer is not None:
            found = layer.quantizer
            settings = found.knee, found.clip_low, found.clip_high, found.bits, found.tail
            assert settings == packed.quantizer.settings()
            assert found.group_size == layer.fmt.act_group_size
        assert torch.equal(teacher.original(place), layer.original)
        stored = sum(
            len(raw(made.folder, f"{layer.name}.{name}")[2]) * 8
            for name in ("weight", "params", "params_scale", "params_range")
            if f"{layer.name}.{name}" in model.state_dict()
        )
        assert layer.bits == pytest.approx(stored / layer.original.numel())
