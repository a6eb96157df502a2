"""Stage 1, PTQ initialization of one linear layer: Hessian-weighted EM, error compensation, coordinate descent.

The objective is the layer's output error tr((W - Q) H (W - Q)^T), H = X^T X over the calibration tokens. Group by
group along the input dimension the levels are fitted by importance-weighted EM, then the columns are assigned one by
one and the remaining columns absorb each column's error (GPTQ, Frantar et al. 2023, as LBLLM and its predecessor BWA
use it). After that, sweeps of coordinate descent on the same objective: the levels of a group are refitted by least
squares under the full Hessian, then each of its columns moves to the level nearest to its optimum given all others.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lbllm import ranks
from lbllm.config import setting_name
from lbllm.errors import LbllmError
from lbllm.models.blocks import BlockCall, layer_inputs, linear_weight, set_linear_weight, shared_inputs
from lbllm.quant.levels import (
    LEVELS,
    assign,
    fit_levels,
    from_groups,
    group_length,
    levels_to_params,
    params_to_levels,
    spans,
    take_levels,
    to_groups,
)
from lbllm.quant.packing import ParamGrid, fit_grid
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import LayerFormat, PtqConfig


@dataclass
class Binarized:
    """A layer after stage 1. ``latent`` (out, in): the compensated weights, whose nearest levels are the result;
    ``levels`` (out, n, K) ascending; ``error`` and ``energy`` (out,): squared output error and squared output of each
    row; ``grid``: the values that 4-bit group parameters can have."""

    latent: Tensor
    levels: Tensor
    error: Tensor
    energy: Tensor
    grid: ParamGrid | None = None

    def split(self, rows: list[int]) -> list[Binarized]:
        """The results of the single layers whose rows were joined in this one."""
        tensors = (self.latent, self.levels, self.error, self.energy)
        layers = [Binarized(*parts) for parts in zip(*(tensor.split(rows) for tensor in tensors), strict=True)]
        if self.grid is not None:
            for layer, scale in zip(layers, self.grid.scale.split(rows), strict=True):
                layer.grid = ParamGrid(scale, self.grid.ranges)
        return layers

    def check(self, name: str) -> None:
        """Raise LbllmError naming the layer if the result is not finite."""
        if not (self.latent.isfinite().all() and self.levels.isfinite().all()):
            raise _degenerate(name)


def _degenerate(name: str) -> LbllmError:
    return LbllmError(
        f"{name}: stage 1 computed values that are not finite. The layer's inputs are degenerate for these texts: use "
        f"other text, or raise {setting_name('ptq.tokens')} or {setting_name('ptq.damping')}"
    )


def damped(hessian: Tensor, damping: float) -> Tensor:
    """H with ``damping`` times its mean diagonal added; inputs that are always zero get a diagonal of their own."""
    mean = hessian.diagonal().mean()
    mean = torch.where(mean == 0, torch.ones_like(mean), mean)
    return hessian + torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device) * (damping * mean)


@torch.no_grad()
def factorize(hessian: Tensor, damping: float) -> tuple[Tensor, Tensor]:
    """The damped H (in, in), and U, the upper Cholesky factor of its inverse, whose rows carry a column's error to the
    columns after it."""
    hessian = damped(hessian, damping)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(hessian))
    return hessian, torch.linalg.cholesky(inverse, upper=True)


@torch.no_grad()
def binarize_layer(
    weight: Tensor,
    hessian: Tensor,
    fmt: LayerFormat,
    config: PtqConfig,
    factors: tuple[Tensor, Tensor] | None = None,
) -> Binarized:
    """Stage 1 for a weight (out, in) and its Hessian (in, in); computes in the Hessian's dtype (float32 or float64).

    ``factors``: the Hessian's ``factorize``, if it is known.
    """
    weight = weight.to(hessian.dtype)
    hessian, factor = factors or factorize(hessian, config.damping)
    count, groups = LEVELS[fmt.format], list(spans(weight.shape[1], fmt.group_size))
    importance = factor.diagonal().square().reciprocal()

    # Transposed, (in, out): the loops below go over input columns, which are then contiguous.
    target = weight.t().contiguous()
    latent, value = target.clone(), torch.empty_like(target)
    grid = _first_grid(weight, fmt, importance, config.em_steps) if fmt.param_bits == 4 else None
    with one_thread():
        levels = [
            _compensate(latent, value, span, factor, importance[span], count, config.em_steps, grid) for span in groups
        ]
        for _ in range(config.sweeps):
            for number, span in enumerate(groups):
                levels[number] = _descend(target, latent, value, levels[number], span, hessian, grid)

    residual = target - value
    return Binarized(
        latent=latent.t().contiguous(),
        levels=torch.stack(levels, 1),
        error=(hessian @ residual).mul_(residual).sum(0),
        energy=(hessian @ target).mul_(target).sum(0),
        grid=grid,
    )


def _first_grid(weight: Tensor, fmt: LayerFormat, importance: Tensor, em_steps: int) -> ParamGrid:
    """The grid for the levels that the weight (out, in) has before any compensation."""
    length = group_length(fmt.group_size, weight.shape[1])
    counted = to_groups(importance[None], length)
    return fit_grid(levels_to_params(fit_levels(to_groups(weight, length), counted, LEVELS[fmt.format], em_steps)))


def on_grid(levels: Tensor, grid: ParamGrid | None) -> Tensor:
    """The nearest ascending levels (out, K) of one group that 4-bit parameters can give."""
    if grid is None:
        return levels
    return params_to_levels(grid.round(levels_to_params(levels)[:, None]))[:, 0].sort(-1).values


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep PyTorch's CPU operations on the calling thread. A second thread does not speed up thousands of small
    operations, and on a busy machine each of them would wait for it: a stage took four times as long beside one busy
    process."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


class _Columns:
    """The levels of a group, laid out to find the nearest level of each weight in one column (out,)."""

    def __init__(self, levels: Tensor) -> None:
        ascending = levels.t().contiguous()
        self.lowest, self.highest = ascending[0], ascending[-1]
        self.middles = (ascending[1:] + ascending[:-1]) / 2
        self.gaps = ascending[1:] - ascending[:-1]

    def snap(self, latent: Tensor) -> Tensor:
        return (self.gaps * (latent > self.middles)).sum(0).add_(self.lowest)


def _compensate(
    latent: Tensor,
    value: Tensor,
    span: slice,
    factor: Tensor,
    importance: Tensor,
    count: int,
    em_steps: int,
    grid: ParamGrid | None,
) -> Tensor:
    """Fit the levels of a group and assign its columns with ``assign_columns``. Returns levels (out, K)."""
    levels = on_grid(fit_levels(latent[span].t().contiguous(), importance, count, em_steps), grid)
    assign_columns(latent, value, span, factor, levels)
    return levels


def assign_columns(latent: Tensor, value: Tensor, span: slice, factor: Tensor, levels: Tensor) -> None:
    """Assign the columns of a group to the nearest of its ascending ``levels`` (out, K), one after the other; the
    columns after each absorb its error.

    ``latent`` and ``value`` (in, out) are the compensated weights and the quantized ones, both changed in place;
    ``factor`` is U of ``factorize``.
    """
    columns = _Columns(levels)
    errors = torch.empty_like(latent[span])
    for offset, column in enumerate(range(span.start, span.stop)):
        value[column] = columns.snap(latent[column])
        errors[offset] = (latent[column] - value[column]) / factor[column, column]
        latent[column + 1 : span.stop].addr_(factor[column, column + 1 : span.stop], errors[offset], alpha=-1)
    latent[span.stop :].addmm_(factor[span, span.stop :].t(), errors, alpha=-1)


def _descend(
    target: Tensor, latent: Tensor, value: Tensor, levels: Tensor, span: slice, hessian: Tensor, grid: ParamGrid | None
) -> Tensor:
    """Refit the levels (out, K) of one group by least squares, then move each of its columns to its conditional
    optimum."""
    local, count = hessian[span, span], levels.shape[-1]
    index = assign(latent[span].t(), levels)
    # The target of the group's values: the gradient of the objective where this group's values are zero.
    pull = hessian[span] @ (target - value) + local @ value[span]

    member = torch.stack([index == k for k in range(count)], -1).to(value.dtype)
    spread = (local @ member.transpose(0, 1).flatten(1)).view(len(local), *levels.shape).transpose(0, 1)
    normal = member.transpose(1, 2) @ spread
    right = (member.transpose(1, 2) @ pull.t()[..., None])[..., 0]
    # A small ridge keeps unused and nearly equal levels close to their present values.
    ridge = 1e-4 * normal.diagonal(dim1=1, dim2=2).mean(-1, keepdim=True).clamp_min(torch.finfo(value.dtype).tiny)
    fitted = torch.linalg.solve(normal + torch.diag_embed(ridge.expand_as(right)), right + ridge * levels)
    present = take_levels(fitted, index).t()
    fitted = on_grid(fitted.sort(-1).values, grid)

    gradient = pull - local @ present
    columns = _Columns(fitted)
    gap = (columns.highest - columns.lowest) / 2
    low, high = columns.lowest - gap, columns.highest + gap
    for offset, column in enumerate(range(span.start, span.stop)):
        torch.clamp(present[offset] + gradient[offset] / local[offset, offset], low, high, out=latent[column])
        value[column] = columns.snap(latent[column])
        gradient.addr_(local[offset], value[column] - present[offset], alpha=-1)
    return fitted


def to_layer(source: nn.Module, fmt: LayerFormat, result: Binarized) -> BinaryLinear:
    """The frozen layer of a result of stage 1, to replace the dense layer ``source``; its parameters are rounded as
    in a checkpoint."""
    in_features = result.latent.shape[1]
    groups = to_groups(result.latent, group_length(fmt.group_size, in_features))
    index = from_groups(assign(groups, result.levels), in_features).contiguous()
    layer = BinaryLinear(source, fmt, levels_to_params(result.levels), index, result.grid)
    layer.round_params()
    return layer


def ptq_block(
    teacher: nn.Module,
    student: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    meant: Mapping[str, Sequence[Tensor]],
    formats: dict[str, LayerFormat],
    config: PtqConfig,
    batch: int,
) -> Iterator[tuple[str, Binarized, BinaryLinear]]:
    """Binarize a block's layers in their order of use; later layers get the outputs of the binarized earlier ones.

    ``student`` starts as a copy of ``teacher`` and gets the binarized weights. ``inputs`` (n, T, hidden) is the
    output of the earlier, already binarized blocks; ``meant`` has, in the same batches, the inputs (tokens, in) of the
    teacher's layers on its own stream, at least for the first of the layers that share an input. ``formats`` names the
    layers to binarize. Yields each layer's name, its result, and the frozen layer with the values that a checkpoint
    stores.
    """
    for sharing in shared_inputs(teacher, inputs[:1], call):
        for fmt, names in by_format(sharing, formats):
            seen = layer_inputs(student, names[0], inputs, call, batch)
            hessian, drift = input_statistics(seen, meant[sharing[0]])
            for name, result in binarize_together(teacher, names, hessian, fmt, config, drift).items():
                layer = to_layer(teacher.get_submodule(name), fmt, result)
                rounded = layer.weight().detach()
                if not rounded.isfinite().all():
                    raise LbllmError(
                        f"{name}: its levels reach {float(result.levels.abs().max()):.2g}, and a checkpoint holds them "
                        "in float16, up to 65504; its weights may be damaged, else keep it dense: "
                        f"{setting_name('quant.skip')}"
                    )
                set_linear_weight(student.get_submodule(name), rounded)
                yield name, result, layer


def by_format(sharing: list[str], formats: dict[str, LayerFormat]) -> Iterator[tuple[LayerFormat, list[str]]]:
    """The layers to binarize among those that share an input, grouped by format."""
    for fmt in sorted({formats[name] for name in sharing if name in formats}, key=str):
        yield fmt, [name for name in sharing if formats.get(name) == fmt]


def binarize_together(
    block: nn.Module,
    names: list[str],
    hessian: Tensor,
    fmt: LayerFormat,
    config: PtqConfig,
    drift: Tensor | None = None,
    factors: tuple[Tensor, Tensor] | None = None,
) -> dict[str, Binarized]:
    """Stage 1 for the named layers of a block: they share an input and therefore a Hessian, so their rows are solved
    together.

    With ``drift`` the weights are first aligned to it. Raises LbllmError naming a layer if a result is not finite.
    """
    weights = [linear_weight(block.get_submodule(name)) for name in names]
    weight = torch.cat(weights)
    try:
        if drift is not None:
            weight = align(weight, hessian, drift, config)
        result = binarize_layer(weight, hessian, fmt, config, factors)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise _degenerate(", ".join(names)) from None
    layers = dict(zip(names, result.split([len(w) for w in weights]), strict=True))
    for name, layer in layers.items():
        layer.check(name)
    return layers


def input_statistics(seen: Iterable[Tensor], meant: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """H = X^T X / tokens of the inputs (tokens, in) that a layer sees, and the drift D = (X_teacher - X)^T X /
    tokens; float32.

    Without a limit, tokens of massive activation would dominate H: a token with more than ten times the median energy
    counts as if it had ten times the median.
    """
    hessian = drift = torch.zeros(())
    tokens = 0
    for x, target in zip(seen, meant, strict=True):
        x = x.float()
        energy = x.square().sum(1)
        weighted = x * (10 * energy.median() / energy.clamp_min(1e-30)).clamp_max(1)[:, None]
        hessian = hessian.to(x.device) + weighted.t() @ x
        drift = drift.to(x.device) + (target.float() - x).t() @ weighted
        tokens += len(x)
    number = torch.tensor(float(tokens), dtype=torch.float64)
    ranks.sum_(hessian, drift, number)
    return hessian / int(number), drift / int(number)


@torch.no_grad()
def align(weight: Tensor, hessian: Tensor, drift: Tensor, config: PtqConfig) -> Tensor:
    """The dense weight (out, in) that comes nearest to the teacher's outputs on the student's inputs: W + W D H^-1.

    It is the least-squares solution of X W'^T = X_teacher W^T (the asymmetric calibration of GPTAQ, Li et al. 2025,
    in closed form), damped towards W, so that a layer also corrects the drift of earlier layers.
    """
    if not config.align:
        return weight.to(hessian.dtype)
    change = torch.linalg.solve(damped(hessian, config.align_damping), drift.t()).t()
    return weight.to(hessian.dtype) + config.align * (weight.to(hessian.dtype) @ change)
