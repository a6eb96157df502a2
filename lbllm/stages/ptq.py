"""Stage 1, PTQ initialization of one linear layer: Hessian-weighted EM, error compensation, coordinate descent.

The objective is the layer's output error tr((W - Q) H (W - Q)^T), H = X^T X over the calibration tokens. Group by
group along the input dimension the levels are fitted by importance-weighted EM, then the columns are assigned one by
one and the remaining columns absorb each column's error (GPTQ, Frantar et al. 2023, as LBLLM and its predecessor BWA
use it). After that, sweeps of coordinate descent on the same objective: the levels of a group are refitted by least
squares under the full Hessian, then each of its columns moves to the level nearest to its optimum given all others.

What stage 1 of a block takes in bytes, beside the teacher's block and the streams. Its layers have W weights; N is the
widest input; the largest group of layers with one input has S weights; a group has g weights and K levels:

    4 N^2 MATRICES                      Hessian, and two of drift, correction, factors
  + the larger of CHUNK_BYTES           temporary tensors of the rows that are solved at the same time, and
                  12 N tokens           of the inputs of one batch: weighted, and their drift, float32; the inputs too
  + W (2 + 1 + 4 K / g)                 to save: latent weights in float16, indices, parameters in float32
  + 4 W                                 the student's rounded weights in float32
  + 4 S K / g                           levels

The last layers of a block need the most, if they are the widest: by then all others are saved and rounded. Where
groups have fewer than 8 weights, fitting a grid of 4-bit parameters (``packing.GRID_FIT``) can need more than S does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor, nn

from lbllm import ranks
from lbllm.config import setting_name
from lbllm.errors import LbllmError
from lbllm.models.blocks import layer_inputs, linear_weight, set_linear_weight, shared_inputs
from lbllm.models.calls import BlockCall
from lbllm.quant.chunks import row_chunks
from lbllm.quant.levels import (
    LEVELS,
    PARAMS,
    assign,
    from_groups,
    group_length,
    levels_to_params,
    params_to_levels,
    spans,
    take_levels,
    to_groups,
)
from lbllm.quant.packing import ParamGrid, fit_grid
from lbllm.quant.table import fit_format, fit_table, has_table, sampled
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import Format, LayerFormat, PtqConfig
from lbllm.stages.hessians import align, correction_, factorize, factorize_, input_statistics
from lbllm.stages.refit import free_levels, on_grid, scaled_levels

# Bytes for each weight of the rows that are solved at the same time: six float32 matrices (target, compensated weights,
# values, residual, a product, weights in the layer's own order), and in a group the temporaries of ``_descend``.
SOLVE_WEIGHT, SOLVE_GROUP = 24, 100

# Bytes for each weight while a layer's rounded weight is made: its level, its index as int64.
_ROUND_WEIGHT = 12


@dataclass
class Binarized:
    """A layer after stage 1. ``latent`` (out, in), float16: the compensated weights; ``index`` (out, in), uint8: the
    nearest level of each before it was rounded, which is the result; ``levels`` (out, n, K) ascending; ``error`` and
    ``energy`` (out,): squared output error and squared output of each row; ``grid``: the values that 4-bit group
    parameters can have; ``table`` (8,): that of three planes, which layers with the same input share here."""

    latent: Tensor
    index: Tensor
    levels: Tensor
    error: Tensor
    energy: Tensor
    grid: ParamGrid | None = None
    table: Tensor | None = None

    def rows(self, part: slice) -> Binarized:
        """The result of some rows; shares their memory."""
        grid = None if self.grid is None else ParamGrid(self.grid.scale[part], self.grid.ranges)
        return Binarized(
            self.latent[part],
            self.index[part],
            self.levels[part],
            self.error[part],
            self.energy[part],
            grid,
            self.table,
        )

    def split(self, lengths: list[int]) -> list[Binarized]:
        """The results of the single layers whose rows were joined in this one."""
        return [self.rows(slice(stop - n, stop)) for n, stop in zip(lengths, accumulate(lengths), strict=True)]

    def check(self, name: str) -> None:
        """Raise LbllmError naming the layer if the result is not finite."""
        # A latent weight beyond float16 is infinite, and is what training can begin with.
        if self.latent.isnan().any() or not self.levels.isfinite().all():
            raise _degenerate(name)


def _degenerate(name: str) -> LbllmError:
    return LbllmError(
        f"{name}: stage 1 computed values that are not finite. The layer's inputs are degenerate for these texts: use "
        f"other text, or raise {setting_name('ptq.tokens')} or {setting_name('ptq.damping')}"
    )


def binarize_layer(weight: Tensor, hessian: Tensor, fmt: LayerFormat, config: PtqConfig) -> Binarized:
    """Stage 1 for a weight (out, in) and its Hessian (in, in)."""
    return binarize_rows([weight], factorize(hessian, config.damping), fmt, config)


@torch.no_grad()
def binarize_rows(
    weights: Sequence[Tensor],
    factors: tuple[Tensor, Tensor],
    fmt: LayerFormat,
    config: PtqConfig,
    correction: Tensor | None = None,
) -> Binarized:
    """Stage 1 for the joined rows of weights (out, in) with the same input.

    ``factors``: the Hessian's ``factorize``; computes in their dtype (float32 or float64). ``correction``: what the
    weights are first aligned with. A row's result depends on the other rows only through the grid, so the rows are
    solved in parts, see ``row_chunks``, and each rank solves its share of them.
    """
    hessian, factor = factors
    rows, columns = sum(len(weight) for weight in weights), len(hessian)
    length = group_length(fmt.group_size, columns)
    groups, count = -(-columns // length), LEVELS[fmt.format]
    mine = ranks.part(rows)
    chunks = row_chunks(mine.stop - mine.start, SOLVE_WEIGHT * columns + SOLVE_GROUP * length)
    parts = [slice(mine.start + part.start, mine.start + part.stop) for part in chunks if part.stop > part.start]

    def aligned(part: slice) -> Tensor:
        return align(_join(weights, part).to(hessian.dtype), correction, config)

    # Table and grid are fitted to the weights before any compensation.
    grid = table = None
    counted = to_groups(factor.diagonal().square().reciprocal()[None], length)
    if has_table(fmt.format):
        table = fit_table(to_groups(align(sampled(weights).to(hessian.dtype), correction, config), length), counted)
    if fmt.param_bits == 4:
        params = hessian.new_empty(rows, groups, PARAMS[fmt.format])
        for part in parts:
            found = fit_format(to_groups(aligned(part), length), counted, fmt.format, config.em_steps, table)[0]
            params[part] = levels_to_params(found, table)
        ranks.gather_(params)
        grid = fit_grid(params)
        del params
    result = Binarized(
        latent=hessian.new_empty(rows, columns, dtype=torch.float16),
        index=hessian.new_empty(rows, columns, dtype=torch.uint8),
        levels=hessian.new_empty(rows, groups, count),
        error=hessian.new_empty(rows),
        energy=hessian.new_empty(rows),
        grid=grid,
        table=table,
    )
    for part in parts:
        _solve(aligned(part), factors, fmt, config, result.rows(part))
    ranks.gather_(result.latent, result.index, result.levels, result.error, result.energy)
    return result


def _join(weights: Sequence[Tensor], part: slice) -> Tensor:
    """Some of the joined rows of ``weights``."""
    starts = accumulate((len(weight) for weight in weights[:-1]), initial=0)
    return torch.cat(
        [w[max(part.start - start, 0) : max(part.stop - start, 0)] for w, start in zip(weights, starts, strict=True)]
    )


def _solve(
    weight: Tensor, factors: tuple[Tensor, Tensor], fmt: LayerFormat, config: PtqConfig, result: Binarized
) -> None:
    """Stage 1 for a weight (out, in); writes to ``result``, whose grid is known."""
    hessian, factor = factors
    groups = list(spans(weight.shape[1], fmt.group_size))
    importance = factor.diagonal().square().reciprocal()
    # Transposed, (in, out): the loops below go over input columns, which are then contiguous.
    target = weight.t().contiguous()
    latent, value = target.clone(), torch.empty_like(target)
    with one_thread():
        levels = [
            _compensate(latent, value, span, factor, importance[span], fmt.format, config.em_steps, result)
            for span in groups
        ]
        residual = target - value
        for _ in range(config.sweeps):
            for number, span in enumerate(groups):
                levels[number] = _descend(target, latent, value, residual, levels[number], span, hessian, result)
    torch.stack(levels, 1, out=result.levels)
    torch.sum((hessian @ residual).mul_(residual), 0, out=result.error)
    torch.sum((hessian @ target).mul_(target), 0, out=result.energy)
    rows = latent.t().contiguous()
    result.latent.copy_(rows)
    index = assign(to_groups(rows, group_length(fmt.group_size, len(hessian))), result.levels)
    result.index.copy_(from_groups(index, len(hessian)))


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
    kind: Format,
    em_steps: int,
    result: Binarized,
) -> Tensor:
    """Fit the levels of a group and assign its columns with ``assign_columns``. Returns levels (out, K)."""
    group = latent[span].t().contiguous()[:, None]
    levels = fit_format(group, importance, kind, em_steps, result.table)[0][:, 0]
    levels = on_grid(levels, result.grid, result.table)
    assign_columns(latent, value, span, factor, levels)
    return levels


def assign_columns(latent: Tensor, value: Tensor, span: slice, factor: Tensor, levels: Tensor) -> None:
    """Assign the columns of a group to the nearest of its ascending ``levels`` (out, K), see ``round_columns``."""
    columns = _Columns(levels)
    round_columns(latent, value, span, factor, lambda column: columns.snap(latent[column]))


def round_columns(latent: Tensor, value: Tensor, span: slice, factor: Tensor, rounded: Callable[[int], Tensor]) -> None:
    """Round the columns of a span one after the other; the columns after each absorb its error.

    ``latent`` and ``value`` (in, out) are the compensated weights and the quantized ones, both changed in place;
    ``factor`` is U of ``factorize``. ``rounded(column)`` is the quantized value (out,) of a column of ``latent``.
    """
    errors = torch.empty_like(latent[span])
    for offset, column in enumerate(range(span.start, span.stop)):
        value[column] = rounded(column)
        errors[offset] = (latent[column] - value[column]) / factor[column, column]
        latent[column + 1 : span.stop].addr_(factor[column, column + 1 : span.stop], errors[offset], alpha=-1)
    latent[span.stop :].addmm_(factor[span, span.stop :].t(), errors, alpha=-1)


def _descend(
    target: Tensor,
    latent: Tensor,
    value: Tensor,
    residual: Tensor,
    levels: Tensor,
    span: slice,
    hessian: Tensor,
    result: Binarized,
) -> Tensor:
    """Refit the levels (out, K) of one group by least squares, then move each of its columns to its conditional
    optimum. ``residual`` (in, out) is ``target - value``, and is kept so."""
    local = hessian[span, span]
    index = assign(latent[span].t(), levels)
    # The target of the group's values: the gradient of the objective where this group's values are zero.
    pull = hessian[span] @ residual + local @ value[span]
    if result.table is None:
        fitted = free_levels(levels, index, local, pull)
    else:
        fitted = scaled_levels(levels, index, local, pull, result.table)
    present = take_levels(fitted, index).t()
    fitted = on_grid(fitted.sort(-1).values, result.grid, result.table)

    gradient = pull - local @ present
    columns = _Columns(fitted)
    gap = (columns.highest - columns.lowest) / 2
    low, high = columns.lowest - gap, columns.highest + gap
    for offset, column in enumerate(range(span.start, span.stop)):
        torch.clamp(present[offset] + gradient[offset] / local[offset, offset], low, high, out=latent[column])
        value[column] = columns.snap(latent[column])
        gradient.addr_(local[offset], value[column] - present[offset], alpha=-1)
    torch.sub(target[span], value[span], out=residual[span])
    return fitted


def to_layer(source: nn.Module, fmt: LayerFormat, result: Binarized) -> BinaryLinear:
    """The frozen layer of a result of stage 1, to replace the dense layer ``source``; its parameters are rounded as
    in a checkpoint."""
    params = levels_to_params(result.levels, result.table)
    layer = BinaryLinear(source, fmt, params, result.index, result.grid, result.table)
    layer.round_params()
    return layer


@torch.no_grad()
def rounded_weight(layer: BinaryLinear) -> Tensor:
    """The weight (out, in) of a frozen layer whose parameters are rounded."""
    weight = layer.params.new_empty(layer.index.shape)
    for rows in row_chunks(len(weight), _ROUND_WEIGHT * layer.in_features):
        levels = params_to_levels(layer.params[rows], layer.table)
        index = to_groups(layer.index[rows], layer.length)
        weight[rows] = from_groups(take_levels(levels, index), layer.in_features)
    return weight


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
    layers to binarize. The block may be on any device; ``meant`` may stay on the CPU, each batch is moved when it is
    used. Yields each layer's name, its result, and the frozen layer with the values that a checkpoint stores.
    """
    for sharing in shared_inputs(teacher, inputs[:1], call):
        for fmt, names in by_format(sharing, formats):
            seen = layer_inputs(student, names[0], inputs, call, batch)
            hessian, drift = input_statistics(seen, meant[sharing[0]])
            results = binarize_together(teacher, names, hessian, fmt, config, drift)
            del hessian, drift  # before the next input's are made
            for name, result in results.items():
                layer = to_layer(teacher.get_submodule(name), fmt, result)
                if not layer.params.isfinite().all():
                    raise LbllmError(
                        f"{name}: its levels reach {float(result.levels.abs().max()):.2g}, and a checkpoint holds them "
                        "in float16, up to 65504; its weights may be damaged, else keep it dense: "
                        f"{setting_name('quant.skip')}"
                    )
                set_linear_weight(student.get_submodule(name), rounded_weight(layer))
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

    With ``drift`` the weights are first aligned to it, and ``hessian`` and ``drift`` are overwritten: both are large.
    Otherwise ``factors`` are the Hessian's ``factorize``, if they are known.

    Raises LbllmError naming a layer if a result is not finite.
    """
    weights = [linear_weight(block.get_submodule(name)) for name in names]
    correction = None
    try:
        if drift is not None:
            correction = correction_(hessian, drift, config)
            factors = factorize_(hessian, config.damping)
        result = binarize_rows(weights, factors or factorize(hessian, config.damping), fmt, config, correction)
    except torch.linalg.LinAlgError:  # type: ignore[attr-defined]
        raise _degenerate(", ".join(names)) from None
    layers = dict(zip(names, result.split([len(w) for w in weights]), strict=True))
    for name, layer in layers.items():
        layer.check(name)
    return layers
