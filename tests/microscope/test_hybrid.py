"""Hybrids against copies of whole models with other modules in them; and that the loaded models stay as they are."""

from __future__ import annotations

import copy
import itertools
import math
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import DynamicCache

from lbllm.baselines.layer import Settings
from lbllm.baselines.rtn import rtn
from lbllm.checkpoints.decode import FusedForward
from lbllm.errors import ConfigError
from lbllm.microscope.address import Address
from lbllm.microscope.hybrid import Bits, Choice, Dense, Edited, FirstBlocks, Only, fitted, hybrid
from lbllm.microscope.pair import Pair
from lbllm.models.blocks import linear_layers
from lbllm.quant.kv_cache import fake_quant_kv
from lbllm.quant.levels import params_to_levels
from lbllm.quant.model_cache import KeepBits, leave_no_cache
from lbllm.quant.packed_layer import PackedLinear
from lbllm.sections import LayerFormat
from tests.helpers.cases import cases
from tests.helpers.tiny_models import SENTENCES
from tests.helpers.tiny_pairs import tiny_pair

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "tied head, one range a token": ("llama", {"act_group_size": -1}),
    "biases, ranges, 4-bit parameters": ("qwen2", {"param_bits": 4, "kv_bits": 8}),
    "windows, norms of keys, no activation bits": ("gemma3", {"act_bits": 16}),
    "transposed weights, one dense layer": ("gpt2", {"skip": ("*.0.mlp.c_fc",), "kv_bits": 16}),
    "one bit": ("llama_bias", {"format": "w1", "param_bits": 8, "act_bits": 8}),
}

FEW = ("biases, ranges, 4-bit parameters", "windows, norms of keys, no activation bits")  # for what takes longer


@pytest.fixture(scope="module", params=CASES)
def pair(request: pytest.FixtureRequest) -> Pair:
    architecture, quant = CASES[request.param]
    return tiny_pair(architecture, **quant)


class Naive(DynamicCache):
    """A cache that rounds the keys and values of some blocks; for one pass over a whole text."""

    def __init__(self, blocks: Sequence[int], bits: int) -> None:
        super().__init__()
        self.blocks, self.bits = blocks, bits

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> Any:
        if layer_idx not in self.blocks:
            return key_states, value_states
        return fake_quant_kv(key_states, self.bits), fake_quant_kv(value_states, self.bits)


def ids_of(pair: Pair, text: str = SENTENCES[0]) -> Tensor:
    return pair.ids(text)[0]


@torch.no_grad()
def brute(pair: Pair, base: str, modules: dict[str, nn.Module], packed: Sequence[int], ids: Tensor) -> Tensor:
    """The logits of a deep copy of a loaded model with copies of these modules in it, that rounds the keys and values
    of the ``packed`` blocks."""
    bits = next(
        (
            hook.layer_class.bits
            for module in pair.student.model.modules()
            for hook in module._forward_pre_hooks.values()
            if isinstance(hook, KeepBits)
        ),
        16,
    )
    model: Any = copy.deepcopy(pair.model("teacher" if base == "teacher" else "student"))
    for module in model.modules():
        for hooks in (module._forward_pre_hooks, module._forward_hooks):
            for key, hook in list(hooks.items()):
                if isinstance(hook, KeepBits) or hook is leave_no_cache:
                    del hooks[key]
    for name, module in modules.items():
        model.set_submodule(f"{pair.path}.{name}", copy.deepcopy(module))
    logits: Tensor = model(input_ids=ids, past_key_values=Naive(packed if bits < 16 else (), bits)).logits
    return logits


@torch.no_grad()
def logits_of(pair: Pair, choice: Choice, ids: Tensor) -> Tensor:
    logits: Tensor = hybrid(pair, choice)(input_ids=ids, use_cache=False).logits
    return logits


def of(pair: Pair, side: Any, places: Sequence[tuple[int, str]]) -> dict[str, nn.Module]:
    return {f"{block}.{name}": pair.layer(side, block, name) for block, name in places}


def every(pair: Pair) -> list[tuple[int, str]]:
    return [(block, name) for block in range(pair.blocks) for name in pair.binarized[block]]


def close(found: Tensor, wanted: Tensor) -> None:
    """A value on the border between two codes falls on either side, so a rounding error can become a step."""
    scale = float(wanted.std())
    assert float((found - wanted).abs().median()) < 1e-5 * scale
    assert float((found - wanted).abs().max()) < 0.03 * scale


def test_the_ends_of_the_slider_are_the_two_models(pair: Pair) -> None:
    ids = ids_of(pair)
    for count, model in ((0, pair.teacher.model), (pair.blocks, pair.student.model)):
        with torch.no_grad():
            wanted = model(input_ids=ids, use_cache=False).logits
        assert torch.equal(logits_of(pair, FirstBlocks(count), ids), wanted)


def test_the_first_blocks_are_the_students_with_their_norms(pair: Pair) -> None:
    ids = ids_of(pair)
    for count in range(1, pair.blocks):
        blocks = {str(number): pair.student.model.get_submodule(f"{pair.path}.{number}") for number in range(count)}
        close(logits_of(pair, FirstBlocks(count), ids), brute(pair, "teacher", blocks, range(count), ids))


def test_single_layers_and_blocks_are_exchanged(pair: Pair) -> None:
    ids, blocks = ids_of(pair), range(pair.blocks)
    block = pair.blocks - 1
    layer = pair.binarized[block][-1]
    whole = [(block, name) for name in pair.binarized[block]]
    others = [number for number in blocks if number != block]
    for made, base, places, packed in (
        (Dense(block, layer), "student", [(block, layer)], blocks),
        (Dense(block), "student", whole, others),
        (Dense(None, layer), "student", [place for place in every(pair) if place[1] == layer], blocks),
        (Only(block, layer), "teacher", [(block, layer)], ()),
        (Only(block), "teacher", whole, [block]),
        (Only(), "teacher", every(pair), blocks),
    ):
        source = "teacher" if base == "student" else "student"
        close(logits_of(pair, made, ids), brute(pair, base, of(pair, source, places), packed, ids))


def test_all_dense_is_the_teacher_but_for_what_is_no_linear_layer(pair: Pair) -> None:
    ids = ids_of(pair)
    model: Any = copy.deepcopy(pair.teacher.model)
    theirs = dict(pair.student.model.named_parameters())
    inside = {f"{pair.path}.{block}.{name}" for block, name in every(pair)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.rpartition(".")[0] not in inside:
                parameter.copy_(theirs[name])
        model.tie_weights()
        wanted = model(input_ids=ids, use_cache=False).logits
    close(logits_of(pair, Dense(), ids), wanted)


def test_the_levels_of_a_group_are_changed(pair: Pair) -> None:
    ids, block = ids_of(pair), pair.blocks - 1
    name = pair.binarized[block][-1]
    layer = pair.packed(block, name)
    row, group, length = 3, 1, layer.length
    levels = (-0.5, -0.25, 0.125, 0.75)[:: 1 if layer.fmt.format == "w1+1" else 3]
    index, _ = layer.unpack()
    weight, columns = layer.dequantize(), slice(group * length, (group + 1) * length)
    weight[row, columns] = torch.tensor(levels)[index[row, columns].long()]
    changed = copy.deepcopy(layer)
    changed.dense = weight
    found = logits_of(pair, Edited(f"{block}/{name}/{row}/{group}", levels), ids)
    close(found, brute(pair, "student", {f"{block}.{name}": changed}, range(pair.blocks), ids))
    assert not torch.equal(found, logits_of(pair, FirstBlocks(pair.blocks), ids))


def test_the_same_levels_change_nothing(pair: Pair) -> None:
    block, name = 0, pair.binarized[0][0]
    levels = params_to_levels(pair.packed(block, name).unpack()[1])[2, 0].tolist()
    ids = ids_of(pair)
    found = logits_of(pair, Edited(f"{block}/{name}/2/0", tuple(levels)), ids)
    assert torch.equal(found, logits_of(pair, FirstBlocks(pair.blocks), ids))


@pytest.mark.parametrize("form", [1, 3, 8, "w1+1", "w1", "w1+1+1"])
def test_a_layer_in_another_format(pair: Pair, form: int | str) -> None:
    ids, block = ids_of(pair), 0
    name = pair.binarized[block][0]
    layer, weight = pair.packed(block, name), pair.weight(block, name)
    changed: Any = copy.deepcopy(layer)
    if isinstance(form, int):
        chosen: int | LayerFormat = form
        changed.dense = rtn(weight, None, Settings(layer.fmt.group_size, form)).weight
    else:
        chosen = LayerFormat.model_validate({"format": form, "group_size": 10, "param_bits": 8, "act_bits": 16})
        changed.dense, changed.quantizer = fitted(weight, chosen, name), None
    found = logits_of(pair, Bits(block, name, chosen), ids)
    close(found, brute(pair, "student", {f"{block}.{name}": changed}, range(pair.blocks), ids))


@given(st.integers(1, 40), st.integers(1, 6), st.sampled_from([4, 8, 16]), st.sampled_from(["w1+1", "w1", "w1+1+1"]))
@cases(20)
def test_fitted_levels_are_few_and_near(columns: int, size: int, param_bits: int, form: str) -> None:
    size = min(size * 4, columns)
    weight = torch.randn(5, columns, generator=torch.Generator().manual_seed(columns))
    fmt = LayerFormat.model_validate({"format": form, "group_size": size, "param_bits": param_bits, "act_bits": 16})
    found = fitted(weight, fmt, "a")
    assert found.shape == weight.shape
    for row, start in itertools.product(range(5), range(0, columns, size)):
        group, given_ = found[row, start : start + size], weight[row, start : start + size]
        assert len(group.unique()) <= {"w1": 2, "w1+1": 4, "w1+1+1": 8}[form]
        # Each weight has the nearest of the levels that its group uses.
        assert torch.all((given_[:, None] - group[None]).abs().amin(1) >= (given_ - group).abs() - 1e-6)
    if param_bits == 16 and form == "w1+1":
        assert float((found - weight).square().sum()) <= 0.2 * float(weight.square().sum()) + 1e-4


def snapshot(model: Any) -> dict[str, Any]:
    """Every attribute of every module by its identity, and the bytes of every tensor."""
    found: dict[str, Any] = {}
    for name, module in model.named_modules():
        for key, value in module.__dict__.items():
            entries = [(inner, id(one)) for inner, one in value.items()] if isinstance(value, dict) else id(value)
            found[f"{name}:{key}"] = entries
        for key, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found[f"{name}:{key} bytes"] = tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes()
    return found


def choices(pair: Pair) -> list[Choice]:
    name = pair.binarized[0][0]
    count = 4 if pair.packed(0, name).fmt.format == "w1+1" else 2
    return [
        *(FirstBlocks(count) for count in range(pair.blocks + 1)),
        Dense(0),
        Dense(),
        Only(pair.blocks - 1),
        Only(0, name),
        Edited(Address(0, name, 0, 0), tuple(float(number) for number in range(count))),
        Bits(0, name, 4),
    ]


@pytest.mark.parametrize("pair", FEW, indirect=True)
def test_the_loaded_models_stay_as_they_are_byte_for_byte(pair: Pair) -> None:
    ids = ids_of(pair)
    models = [pair.teacher.model, pair.student.model]
    for model in models:
        model(input_ids=ids)  # a packed layer arranges its bits at its first call
    before = [snapshot(model) for model in models]
    for choice in choices(pair):
        made: Any = hybrid(pair, choice)
        made(input_ids=ids, use_cache=False)
        made.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=2, do_sample=False)
    assert [snapshot(model) for model in models] == before


def test_a_hybrid_never_decodes_by_the_students_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    pair, fused = tiny_pair("llama"), []
    monkeypatch.setattr(FusedForward, "_weights", lambda self: fused.append(self))
    ids = ids_of(pair)
    options: Any = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 3, "min_new_tokens": 3}
    pair.student.model.generate(ids, do_sample=False, **options)  # type: ignore[operator]
    assert fused
    fused.clear()
    for choice in choices(pair):
        if choice != FirstBlocks(pair.blocks):
            made: Any = hybrid(pair, choice)
            made.generate(ids, do_sample=False, **options)
    assert not fused


@torch.no_grad()
@pytest.mark.parametrize("pair", FEW, indirect=True)
def test_token_by_token_it_gives_what_it_gives_for_the_text(pair: Pair) -> None:
    ids = ids_of(pair)[:, :12]
    for choice in (FirstBlocks(1), Dense(0), Only(pair.blocks - 1)):
        made: Any = hybrid(pair, choice)
        cache, parted = DynamicCache(config=made.config), []
        for place in range(ids.shape[1]):
            parted.append(made(ids[:, place : place + 1], past_key_values=cache, use_cache=True).logits)
        close(torch.cat(parted, 1), made(input_ids=ids, use_cache=False).logits)


@pytest.mark.parametrize("pair", FEW[:1], indirect=True)
def test_threads_get_what_each_gets_alone(pair: Pair) -> None:
    ids, fresh = ids_of(pair), choices(pair)
    wanted = [logits_of(pair, choice, ids) for choice in fresh]
    answers = pair.student.model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
    results: list[bool] = []

    def ask(order: Sequence[int]) -> None:
        results.extend(torch.equal(logits_of(pair, fresh[place], ids), wanted[place]) for place in order)

    def chat() -> None:
        for _ in range(3):
            found: Any = pair.student.model.generate(ids, max_new_tokens=4, do_sample=False)  # type: ignore[operator]
            results.append(torch.equal(found, answers))

    order = range(len(fresh))
    threads = [threading.Thread(target=ask, args=(one,)) for one in (order, order[::-1])]
    threads.append(threading.Thread(target=chat))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 2 * len(fresh) + 3
    assert all(results)


def test_a_hybrid_holds_no_weights_of_its_own(pair: Pair) -> None:
    known = {
        tensor.data_ptr()
        for model in (pair.teacher.model, pair.student.model)
        for tensor in model.state_dict().values()
    }
    for choice in choices(pair):
        own = [tensor for tensor in hybrid(pair, choice).state_dict().values() if tensor.data_ptr() not in known]
        assert sum(tensor.numel() for tensor in own) <= (48 * 160 if isinstance(choice, Bits) else 16)


REFUSED: list[tuple[Choice, str]] = [
    (FirstBlocks(-1), "choose 0 to 2"),
    (FirstBlocks(3), "3 blocks can't be binarized: the models have 2"),
    (Dense(2), "there is no block 2; the blocks are 0 to 1"),
    (Only(0, "mlp.up"), "block 0 has no layer 'mlp.up'; its layers are self_attn.q_proj"),
    (Dense(None, "mlp.up"), "no block has a layer 'mlp.up'"),
    (Dense(0, "mlp.up_proj"), "0/mlp.up_proj is dense in the student as in the teacher"),
    (Only(0, "mlp.up_proj"), "Choose a binarized layer"),
    (Bits(0, "mlp.up_proj", 4), "0/mlp.up_proj is dense"),
    (Bits(0, "mlp.down_proj", 9), "9 bits a weight are not possible here; choose 1 to 8"),
    (Bits(0, "mlp.down_proj", 0), "0 bits"),
    (
        Bits(0, "mlp.down_proj", LayerFormat(format="w1", group_size=91, param_bits=16, act_bits=16)),
        "0/mlp.down_proj: a group of 91 is longer than a row of 90 weights",
    ),
    (
        Bits(0, "mlp.down_proj", LayerFormat(format="w1", group_size=9, param_bits=16, act_bits=8)),
        "the student has one for 4 bits in ranges of 16; give the same",
    ),
    (Edited("0/mlp.up_proj/0/0", (0.0, 1.0, 2.0, 3.0)), "0/mlp.up_proj is dense"),
    (Edited("0/mlp.down_proj/0", (0.0, 1.0, 2.0, 3.0)), "is not the address of a group"),
    (Edited("zero", (0.0, 1.0, 2.0, 3.0)), "is not an address"),
    (Edited("0/mlp.down_proj/48/0", (0.0, 1.0, 2.0, 3.0)), "has rows 0 to 47 of groups 0 to 5"),
    (Edited("0/mlp.down_proj/0/6", (0.0, 1.0, 2.0, 3.0)), "has rows 0 to 47 of groups 0 to 5"),
    (Edited("0/mlp.down_proj/0/0", (0.0, 1.0)), "2 levels are given; a group here has 4"),
    (Edited("0/mlp.down_proj/0/0", (0.0, 1.0, math.nan, 3.0)), "the level nan is not a finite"),
    (Edited("0/mlp.down_proj/0/0", (0.0, 1.0, 1e39, 3.0)), r"the level 1e\+39 is not a finite"),
]


@pytest.fixture(scope="module")
def with_a_dense_layer() -> Pair:
    return tiny_pair("llama", skip=("*.0.mlp.up_proj",))


@pytest.mark.parametrize(("choice", "words"), REFUSED, ids=[str(choice) for choice, _ in REFUSED])
def test_what_can_not_be_is_said(with_a_dense_layer: Pair, choice: Choice, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        hybrid(with_a_dense_layer, choice)


def test_layers_are_linear_layers(pair: Pair) -> None:
    block = pair.teacher.model.get_submodule(f"{pair.path}.0")
    assert pair.layers == list(linear_layers(block))
    packed = [isinstance(pair.layer("student", 0, name), PackedLinear) for name in pair.layers]
    assert [name for name, one in zip(pair.layers, packed, strict=True) if one] == list(pair.binarized[0])
