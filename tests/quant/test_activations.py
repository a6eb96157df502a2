"""The activation grid against its formula written out in float64, its gradients against autograd, and the KV cache
against transformers' own."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from lbllm import kernels
from lbllm.quant.activations import CLIP_RANGE, KNEE_RANGE, ActQuantizer, decode, encode, make_grid
from lbllm.quant.kv_cache import PackedKVLayer, TrainingCache, decode_kv, encode_kv, fake_quant_kv
from tests.helpers.cases import cases


def random(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def scalars(knee: float, low: float, high: float) -> tuple[Tensor, Tensor, Tensor]:
    knees, lows, highs = torch.tensor([knee, low, high], dtype=torch.float64)
    return knees, lows, highs


def heavy_tailed(*shape: int, seed: int = 0) -> Tensor:
    """Float64 values with a dense middle and rare large ones, as activations have."""
    body = torch.randn(shape, generator=random(seed), dtype=torch.float64)
    return body * torch.exp(1.2 * torch.randn(shape, generator=random(seed + 1), dtype=torch.float64))


def grid_values(
    token: list[float], knee: float, clip_low: float, clip_high: float, bits: int, tail: int
) -> list[float]:
    """All values of a token's grid in ascending order, as the module's docstring defines them."""
    bottom, top = clip_low * min(0.0, *token), clip_high * max(0.0, *token)
    n = 2**bits - 1 - 2 * tail
    s = knee * (top - bottom) / n if tail else (top - bottom) / n
    z = round(-(knee if tail else 1.0) * bottom / s)
    values = [s * (q - z) for q in range(n + 1)]
    if tail:
        step_low, step_high = max(values[0] - bottom, 0) / tail, max(top - values[-1], 0) / tail
        lower = [values[0] - step_low * j for j in range(tail, 0, -1)]
        values = lower + values + [values[-1] + step_high * j for j in range(1, tail + 1)]
    return values


@given(
    st.floats(*KNEE_RANGE),
    st.floats(*CLIP_RANGE),
    st.floats(*CLIP_RANGE),
    st.sampled_from([(4, 0), (4, 1), (4, 2), (4, 3), (4, 6), (8, 0)]),
    st.floats(-3, 3),
    st.integers(0, 2**32),
)
@cases(80)
def test_every_value_goes_to_the_nearest_of_its_tokens_grid(
    knee: float, clip_low: float, clip_high: float, kind: tuple[int, int], shift: float, seed: int
) -> None:
    bits, tail = kind
    x = heavy_tailed(3, 40, seed=seed) + shift
    grid = make_grid(x, *scalars(knee, clip_low, clip_high), bits, tail)
    codes = encode(x, grid, bits, tail)
    quantized = decode(codes, grid)
    steps = 2**bits - 1 - 2 * tail
    for token in range(3):
        values = torch.tensor(grid_values(x[token].tolist(), knee, clip_low, clip_high, bits, tail), dtype=x.dtype)
        assert len(values) == 2**bits
        distances = (quantized[token, :, None] - values).abs()
        assert float(distances.amin(-1).max()) < 1e-9
        error, least = (x[token] - quantized[token]).abs(), (x[token, :, None] - values).abs().amin(-1)
        assert (error <= least + 1e-9).all()
        assert 0.0 in values.tolist()
        z = float(grid.zero[token])
        assert ((codes.body[token] >= -z) & (codes.body[token] <= steps - z)).all()
    assert all(torch.equal(part, part.round()) for part in codes)
    assert ((codes.low >= 0) & (codes.low <= tail) & (codes.high >= 0) & (codes.high <= tail)).all()
    # A value of one tail sits on that edge of the body and in no other tail.
    assert ((codes.low == 0) | (codes.body == -grid.zero)).all()
    assert ((codes.high == 0) | (codes.body == steps - grid.zero)).all()
    # What lies on the grid stays there.
    torch.testing.assert_close(decode(encode(quantized, grid, bits, tail), grid), quantized)


@pytest.mark.parametrize("tail", [1, 2, 3])
def test_a_token_with_two_tails_has_sixteen_values(tail: int) -> None:
    x = torch.linspace(-2, 3, 5001, dtype=torch.float64)[None]
    grid = make_grid(x, *scalars(0.3, 1.0, 1.0), 4, tail)
    assert len(decode(encode(x, grid, 4, tail), grid).unique()) == 16


def test_zero_is_exact() -> None:
    x = heavy_tailed(200, 32).float() * torch.logspace(-6, 6, 200)[:, None]
    x[:, 5] = 0
    for bits in (4, 8):
        assert (ActQuantizer(bits, 2)(x)[:, 5] == 0).all()


def test_a_packed_matmul_can_sum_three_integer_planes() -> None:
    """W x_q = s W b - s- W j- + s+ W j+ with integer sums, as the module's docstring says."""
    x = heavy_tailed(6, 64)
    weight = torch.randn(10, 64, generator=random(3), dtype=torch.float64)
    grid = make_grid(x, *scalars(0.25, 0.9, 0.95), 4, 2)
    codes = encode(x, grid, 4, 2)
    body, low, high = ((part.to(torch.int8).double()) @ weight.t() for part in codes)
    torch.testing.assert_close(decode(codes, grid) @ weight.t(), grid.body * body - grid.low * low + grid.high * high)
    assert int(codes.body.max() - codes.body.min()) < 16


SPECIAL_TOKENS: dict[str, Callable[[Tensor], Tensor]] = {
    "zero": torch.zeros_like,
    "positive": torch.abs,
    "negative": lambda x: -x.abs(),
    "constant": lambda x: torch.full_like(x, 0.7),
    "one value": lambda x: x * (torch.arange(x.shape[-1]) == 3),
    "huge outlier": lambda x: x + 1e6 * (torch.arange(x.shape[-1]) == 3),
    "tiny": lambda x: x * 1e-20,
    "far from zero": lambda x: x + 1e4,
}


@pytest.mark.parametrize("kind", SPECIAL_TOKENS)
@pytest.mark.parametrize("bits", [4, 8])
def test_special_tokens(kind: str, bits: int) -> None:
    x = SPECIAL_TOKENS[kind](heavy_tailed(4, 32).float()).requires_grad_()
    quantizer = ActQuantizer(bits, 2)
    quantized = quantizer(x)
    quantized.square().sum().backward()
    assert quantizer.act.grad is not None
    assert x.grad is not None
    assert all(tensor.isfinite().all() for tensor in (quantized, x.grad, quantizer.act.grad))
    # No value is further off than the largest gap of a grid over the token's own range, zero included.
    span = x.detach().clamp_min(0).amax(-1) - x.detach().clamp_max(0).amin(-1)
    gap = span / 255 if bits == 8 else span * 0.7 / 2
    assert ((quantized - x).abs().amax(-1) <= gap * 0.51 + 1e-11).all()


@torch.no_grad()
def test_beside_a_huge_outlier_the_rest_of_its_side_vanishes() -> None:
    x = torch.randn(1, 32, generator=random()).abs()
    x[0, 3] = 1e6
    quantized = ActQuantizer(4, 2)(x)
    assert float(quantized[0, 3]) == pytest.approx(1e6)
    assert int(quantized.count_nonzero()) == 1


def test_each_token_has_a_grid_of_its_own() -> None:
    x = heavy_tailed(2, 3, 16).float()
    quantizer = ActQuantizer(4, 2)
    alone = torch.stack([torch.stack([quantizer(token) for token in sequence]) for sequence in x])
    assert torch.equal(quantizer(x), alone)


@pytest.mark.parametrize("bits", [4, 8])
def test_training_and_inference_give_the_same_values(bits: int) -> None:
    quantizer = ActQuantizer(bits, 2)
    x = heavy_tailed(5, 40).float()
    with torch.no_grad():
        inference = quantizer(x)
    assert torch.equal(quantizer(x.clone().requires_grad_()), inference)


def test_computes_in_float32_and_returns_the_inputs_dtype() -> None:
    x = heavy_tailed(5, 40).bfloat16()
    quantizer = ActQuantizer(4, 2)
    assert torch.equal(quantizer(x), quantizer(x.float()).bfloat16())


@given(
    st.integers(1, 90),
    st.integers(1, 100),
    st.sampled_from([(4, 0), (4, 3), (8, 0)]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 2**32),
)
@cases(60)
def test_features_that_share_a_range_are_quantized_like_a_token_of_their_own(
    features: int, size: int, kind: tuple[int, int], dtype: torch.dtype, compiled: bool, seed: int
) -> None:
    """Values and gradients, also those of knee and clips, which all ranges have in common."""
    assert kernels.ready()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "ready", lambda: compiled)
        x, direction = heavy_tailed(2, 3, features, seed=seed).to(dtype), torch.randn(2, 3, features)
        whole, parts = x.clone().requires_grad_(), x.clone().requires_grad_()
        quantizer, alone = ActQuantizer(*kind, group_size=size), ActQuantizer(*kind)
        got = quantizer(whole)
        expected = torch.cat([alone(part) for part in parts.split(size, -1)], -1)
        assert got.dtype == dtype
        assert torch.equal(got, expected)
        (got * direction).sum().backward()
        (expected * direction).sum().backward()
    assert whole.grad is not None
    assert parts.grad is not None
    assert torch.equal(whole.grad, parts.grad)
    torch.testing.assert_close(quantizer.act.grad, alone.act.grad, rtol=1e-4, atol=1e-4)


def graph_nodes(result: Tensor) -> list[str]:
    """The names of all operations that made a result."""
    seen, left = set(), [result.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            left += [before for before, _ in node.next_functions]
    return [type(node).__name__ for node in seen]


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("size", [-1, 8, 7])
def test_layers_that_read_one_input_quantize_it_once(
    size: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert kernels.ready()
    monkeypatch.setattr(kernels, "ready", lambda: compiled)
    quantizer, x = ActQuantizer(4, 3, group_size=size), heavy_tailed(2, 3, 32).float().requires_grad_()
    weights = torch.randn(3, 16, 32, generator=random()).requires_grad_()
    total = torch.stack([torch.nn.functional.linear(quantizer(x), weight) for weight in weights])
    assert sum("Compiled" in name or "FakeQuant" in name for name in graph_nodes(total)) == 1
    with torch.no_grad():
        alone = quantizer(x)
    assert torch.equal(total, torch.stack([torch.nn.functional.linear(alone, weight) for weight in weights]))


def reference(x: Tensor, act: Tensor, bits: int, tail: int, temperature: float) -> Tensor:
    """The quantizer as a plain differentiable program: LSQ in the body, codes held in the tails, soft mask.

    LSQ: v = x / s is rounded straight through inside the range and constant outside it.
    """
    n = 2**bits - 1 - 2 * tail
    bottom = act[1] * x.detach().amin(-1, keepdim=True).clamp_max(0)
    top = act[2] * x.detach().amax(-1, keepdim=True).clamp_min(0)
    s = act[0] * (top - bottom) / n if tail else (top - bottom) / n
    z = ((-act[0] * bottom / s) if tail else (-bottom / s)).round().detach()

    def through(value: Tensor, lowest: Tensor | float, highest: Tensor | float) -> Tensor:
        lowest, highest = torch.as_tensor(lowest), torch.as_tensor(highest)
        rounded = value + (value.round() - value).detach()
        return torch.where(value < lowest, lowest, torch.where(value > highest, highest, rounded))

    if not tail:
        return s * through(x / s, -z - 0.5, n - z + 0.5).clamp(-z, n - z)
    lower, upper = -z * s, (n - z) * s
    low, high = (lower - bottom) / tail, (top - upper) / tail
    in_body = s * through(x / s, -z, n - z)
    in_high = upper + high * ((x - upper) / high).round().clamp(0, tail).detach() + (x - x.detach()) * (x <= top)
    in_low = lower - low * ((lower - x) / low).round().clamp(0, tail).detach() + (x - x.detach()) * (x >= bottom)
    value = torch.where(x > upper, in_high, torch.where(x < lower, in_low, in_body))
    for mask, edge, step, in_tail in (
        (torch.sigmoid((upper - x.detach()) / (temperature * s.detach())), upper, high, in_high),
        (torch.sigmoid((x.detach() - lower) / (temperature * s.detach())), lower, low, in_low),
    ):
        near = ((x - edge).abs() < s + step).detach()
        soft = mask * (in_body - in_tail).detach() * near
        value = value + soft - soft.detach()
    return value


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize(("bits", "tail"), [(4, 2), (4, 1), (8, 0)])
@pytest.mark.parametrize("act", [(0.3, 0.9, 0.85), (0.15, 0.6, 0.95), (0.7, 0.8, 0.7)])
def test_gradients_are_those_of_the_formula(
    bits: int, tail: int, act: tuple[float, float, float], compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through steps and edges to knee and clips, and straight through to x."""
    assert kernels.ready()
    monkeypatch.setattr(kernels, "ready", lambda: compiled)
    quantizer = ActQuantizer(bits, tail, temperature=0.5)
    quantizer.act.data.copy_(torch.tensor(act))
    x = heavy_tailed(50, 64).float().requires_grad_()
    direction = torch.randn(50, 64, generator=random(5))
    quantized = quantizer(x)
    got = torch.autograd.grad((quantized * direction).sum(), [x, quantizer.act])

    x64 = x.detach().double().requires_grad_()
    act64 = quantizer.act.detach().double().requires_grad_()
    expected = reference(x64, act64, bits, tail, 0.5)
    torch.testing.assert_close(quantized.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = torch.autograd.grad((expected * direction).sum(), [x64, act64], allow_unused=True)
    torch.testing.assert_close(got[0].double(), wanted[0])
    assert wanted[1] is not None
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_of_x_is_one_inside_the_clipped_range_and_zero_outside(bits: int) -> None:
    quantizer = ActQuantizer(bits, 2)
    x = heavy_tailed(300, 64).float()
    for clip in (1.0, 0.6):
        quantizer.act.data.copy_(torch.tensor([0.3, clip, clip]))
        leaf = x.clone().requires_grad_()
        quantizer(leaf).sum().backward()
        top, bottom = clip * x.amax(-1, keepdim=True), clip * x.amin(-1, keepdim=True)
        # 8 bits: the whole range may lie half a step off, since zero is one of its values.
        margin = (top - bottom) / 255 if bits == 8 else 0 * top
        assert leaf.grad is not None
        assert (leaf.grad[(x >= bottom) & (x <= top)] == 1).all()
        assert (leaf.grad[(x < bottom - margin - 1e-3) | (x > top + margin + 1e-3)] == 0).all()


def test_training_finds_a_good_knee() -> None:
    """The gradient through the soft mask leads from a poor knee to nearly the best one."""
    x = heavy_tailed(200, 64).float()

    def error(knee: float) -> float:
        quantizer = ActQuantizer(4, 2)
        quantizer.act.data[0] = knee
        return float((quantizer(x) - x).square().mean().detach())

    best = min(error(knee) for knee in torch.linspace(0.02, 1, 50).tolist())
    for start in (0.1, 0.9):
        quantizer = ActQuantizer(4, 2)
        quantizer.act.data[0] = start
        optimizer = torch.optim.Adam([quantizer.act], lr=0.02)
        for _ in range(60):
            optimizer.zero_grad()
            (quantizer(x) - x).square().mean().backward()
            optimizer.step()
            quantizer.bound()
        trained = float((quantizer(x) - x).square().mean().detach())
        assert trained < error(start)
        assert trained < 1.1 * best


def test_bound_brings_parameters_back_into_their_ranges() -> None:
    quantizer = ActQuantizer(4, 2)
    quantizer.act.data.copy_(torch.tensor([-1.0, 7.0, 0.0]))
    quantizer.bound()
    assert quantizer.act.tolist() == pytest.approx([KNEE_RANGE[0], CLIP_RANGE[1], CLIP_RANGE[0]])
    quantizer(heavy_tailed(5, 16).float()).sum().backward()
    assert quantizer.act.grad is not None
    assert quantizer.act.grad.count_nonzero() == 3


# The KV cache.


def states(*shape: int, seed: int = 0) -> Tensor:
    """Keys or values (batch, heads, tokens, head_dim), some heads far off zero."""
    offset = 5 * torch.randn(shape[1], 1, shape[3], generator=random(seed + 1))
    return torch.randn(shape, generator=random(seed)) + offset


@pytest.mark.parametrize("bits", [4, 8])
def test_kv_codes_are_off_by_half_a_step(bits: int) -> None:
    x = states(2, 3, 20, 16) * torch.logspace(-3, 3, 20)[:, None]
    codes, scale = encode_kv(x, bits)
    assert codes.dtype == torch.uint8
    assert int(codes.max()) == 2**bits - 1
    assert scale.dtype == torch.float16
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    # Half a step, and minimum and steps rounded to float16.
    bound = 0.5 * (high - low) / (2**bits - 1) + (low.abs() + high - low) * 2**-11 + 2**-20
    assert ((decode_kv(codes, scale, torch.float32) - x).abs() <= bound).all()


@given(st.floats(-9, 4), st.floats(-100, 100), st.sampled_from([4, 8]), st.integers(0, 2**32))
@cases(60)
def test_fake_quantized_kv_is_what_the_cache_gives_back(size: float, offset: float, bits: int, seed: int) -> None:
    x = torch.randn(1, 2, 3, 8, generator=random(seed)) * 10**size + offset
    assert torch.equal(fake_quant_kv(x, bits), decode_kv(*encode_kv(x, bits), torch.float32))


def test_kv_gradients_pass_straight_through() -> None:
    x = states(1, 2, 5, 8).requires_grad_()
    fake_quant_kv(x, 4).sum().backward()
    assert x.grad is not None
    # Ends of the range that float16 rounded inwards are clipped.
    assert float((x.grad == 1).float().mean()) > 0.85
    assert ((x.grad == 0) | (x.grad == 1)).all()


def test_equal_keys_survive() -> None:
    x = torch.full((1, 1, 2, 8), 0.1234)
    torch.testing.assert_close(fake_quant_kv(x, 4), x, rtol=1e-3, atol=0)


def layer_of(bits: int) -> PackedKVLayer:
    layer = PackedKVLayer()
    layer.bits = bits
    return layer


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("head_dim", [16, 7])
def test_the_packed_cache_equals_fake_quantization_however_it_is_filled(bits: int, head_dim: int) -> None:
    keys, values = states(2, 3, 11, head_dim), states(2, 3, 11, head_dim + 2, seed=3)
    expected = fake_quant_kv(keys, bits), fake_quant_kv(values, bits)
    at_once = layer_of(bits).update(keys, values)
    assert all(torch.equal(got, want) for got, want in zip(at_once, expected, strict=True))
    layer = layer_of(bits)
    for begin, end in ((0, 4), (4, 5), (5, 6), (6, 11)):
        assert layer.get_seq_length() == begin
        assert layer.get_mask_sizes(end - begin) == (end, 0)
        pieces = layer.update(keys[:, :, begin:end], values[:, :, begin:end])
        assert all(torch.equal(got, want[:, :, :end]) for got, want in zip(pieces, expected, strict=True))


@pytest.mark.parametrize(("bits", "head_dim"), [(4, 64), (4, 7), (8, 64)])
def test_the_packed_cache_takes_the_bits_it_says(bits: int, head_dim: int) -> None:
    layer = layer_of(bits)
    assert layer.nbytes() == 0
    layer.update(states(2, 3, 10, head_dim), states(2, 3, 10, head_dim))
    vectors = 2 * 2 * 3 * 10
    assert layer.nbytes() == vectors * (math.ceil(head_dim * bits / 8) + 4)
    assert layer.keys is not None
    assert layer.values is not None
    assert layer.keys.numel() == layer.values.numel() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_in_16_bits_the_cache_keeps_float16_and_no_infinity(dtype: torch.dtype) -> None:
    keys, values = states(2, 3, 11, 7).to(dtype), 1e6 * states(2, 3, 11, 9, seed=3).to(dtype)
    layer = layer_of(16)
    for begin, end in ((0, 4), (4, 5), (5, 11)):
        got = layer.update(keys[:, :, begin:end], values[:, :, begin:end])
    assert layer.nbytes() == 2 * (keys.numel() + values.numel())
    assert all(part.dtype == dtype for part in got)
    torch.testing.assert_close(got[0], keys, rtol=2**-11, atol=1e-7)
    assert torch.equal(got[1], values.clamp(-65504, 65504).half().to(dtype))


def repeat_and_select(layer: DynamicLayer, k: int) -> None:
    layer.batch_repeat_interleave(2)
    layer.batch_select_indices(torch.tensor([k, 3 - k]))


OPERATIONS: dict[str, Callable[[DynamicLayer, int], object]] = {
    "crop": lambda layer, k: layer.crop(-k),
    "reorder": lambda layer, k: layer.reorder_cache(torch.LongTensor([k % 2, (k + 1) % 2])),
    "repeat and select": repeat_and_select,
    "reset": lambda layer, k: layer.reset(),
    "update": lambda layer, k: layer.update(fake_quant_kv(states(2, 2, k + 1, 8, seed=k), 4), states(2, 2, k + 1, 4)),
}


@given(st.lists(st.tuples(st.sampled_from(sorted(OPERATIONS)), st.integers(0, 3)), max_size=8))
@cases(60)
def test_the_packed_cache_does_what_transformers_own_does(operations: list[tuple[str, int]]) -> None:
    ours, theirs = PackedKVLayer(), DynamicLayer()
    for name, argument in operations:
        OPERATIONS[name](ours, argument)
        OPERATIONS[name](theirs, argument)
        assert ours.get_seq_length() == theirs.get_seq_length()
    keys, values = states(2, 2, 1, 8), states(2, 2, 1, 4)
    expected = [fake_quant_kv(part, 4) for part in theirs.update(keys, values)]
    assert all(torch.equal(got, want) for got, want in zip(ours.update(keys, values), expected, strict=True))


def test_crop_refuses_a_length_to_keep_as_transformers_does() -> None:
    for layer in (PackedKVLayer(), DynamicLayer()):
        layer.update(states(1, 1, 5, 8), states(1, 1, 5, 8))
        with pytest.raises(ValueError, match="negative"):
            layer.crop(3)
        layer.crop(0)
        assert layer.get_seq_length() == 5
        layer.crop(-7)
        assert layer.get_seq_length() == 0


def test_a_whole_cache_of_packed_layers_can_be_cropped_and_emptied() -> None:
    cache = Cache(layer_class_to_replicate=PackedKVLayer)
    for number in range(2):
        cache.update(states(1, 2, 6, 8), states(1, 2, 6, 8), number)
    cache.crop(-2)
    assert [cache.get_seq_length(number) for number in range(2)] == [4, 4]
    cache.reset()
    assert cache.get_seq_length() == 0


def test_the_training_cache_returns_what_the_packed_one_would() -> None:
    keys, values = states(2, 2, 5, 8), states(2, 2, 5, 8, seed=3)
    cache = TrainingCache(4)
    expected = layer_of(4).update(keys, values)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(cache.update(keys, values, 0), expected, strict=True))
        assert cache.get_seq_length() == 0
