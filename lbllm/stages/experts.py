"""Stages 1 to 3 on the experts of a block, one expert after the other.

Stage 1. The Hessian of an expert comes from the tokens that are routed to it. With few of them it would say little
about most directions, so it is shrunk towards what all tokens of the layer say, as if ``PRIOR`` tokens per column more
had been seen:

    H = (n H_e + m H_all) / (n + m),    m = PRIOR * columns

n is the number of the expert's tokens. H_all is the mean over all tokens of the layer's input, each of which goes to
the same number of experts: so it is the mean of the experts' Hessians by their tokens. The columns of ``down_proj`` are
features of one expert alone; there H_all comes from this expert's own features for a sample of the layer's tokens. An
expert without tokens has H_all alone. The drift of the inputs is treated in the same way.

Stages 2 and 3. The experts train one after the other, each on its own tokens, while the others stay as they are: block
coordinate descent on the loss of joint training, in the same order of texts. An optimizer's state exists for one expert
at a time. The loss is that of the block's output where the experts' sum is added to it; where a block does more with
the sum, it is that of the sum, against the teacher's.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lbllm.errors import LbllmError
from lbllm.models.blocks import entering, set_linear_weight, share_copy
from lbllm.models.experts import Experts, Routed
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import AarConfig, LayerFormat, PtqConfig, WatConfig
from lbllm.stages.aar import search_grid, stacked_weights
from lbllm.stages.distill import (
    batch_order,
    binary_layers,
    cosine,
    product_dtype,
    quantizers_of,
    token_error,
    update_layers,
)
from lbllm.stages.hessians import bounded
from lbllm.stages.ptq import Binarized, binarize_together, by_format, rounded_weight, to_layer
from lbllm.stages.routing import ROWS, Entered
from lbllm.stages.wat import thaw_layers

# Tokens of the layer that are added to an expert's own in stage 1, for each column of its matrices.
PRIOR = 0.1
# Tokens of the layer on which the features of an expert are measured for the prior of ``down_proj``, at most.
SAMPLE = 1_024
# Tokens on which the loss of an expert is measured, at most.
PROBE_ROWS = 2_048


@dataclass
class Statistics:
    """Sums over ``tokens``: of x x^T and of (x_teacher - x) x^T, both (in, in) float32. A token of massive activation
    counts less, as in ``input_statistics``."""

    hessian: Tensor
    drift: Tensor
    tokens: int

    def mean_with(self, prior: Statistics) -> tuple[Tensor, Tensor]:
        """Return Hessian and drift, shrunk towards those of ``prior`` by the number of tokens."""
        more = PRIOR * len(self.hessian)
        total = self.tokens + more
        found = zip((self.hessian, self.drift), (prior.hessian, prior.drift), strict=True)
        hessian, drift = (own.add(other, alpha=more / max(1, prior.tokens)).div_(total) for own, other in found)
        return hessian, drift


def statistics(x: Tensor, target: Tensor, weights: Tensor, device: torch.device) -> Statistics:
    """Return the statistics of inputs x (tokens, in) and of the teacher's, with a weight (tokens,) for each token."""
    columns = x.shape[1]
    hessian, drift = (torch.zeros(columns, columns, device=device) for _ in range(2))
    for rows, other, each in zip(x.split(ROWS), target.split(ROWS), weights.split(ROWS), strict=True):
        part = rows.to(device).float()
        weighted = part * each.to(device)[:, None]
        hessian.addmm_(weighted.t(), part)
        drift.addmm_((other.to(device).float() - part).t(), weighted)
    return Statistics(hessian, drift, len(x))


@dataclass
class LayerInputs:
    """The inputs of all experts of a block: the student's, the teacher's for the same rows, and what follows from
    them. ``weights`` (rows,): how much each row counts; ``all``: the statistics of all rows; ``sample``: some of them,
    spread evenly."""

    entered: Entered
    teacher: Tensor
    weights: Tensor
    all: Statistics
    sample: Tensor

    @classmethod
    def of(cls, entered: Entered, teacher: Tensor, device: torch.device) -> LayerInputs:
        """Return the layer's inputs; ``teacher`` (rows, in) on the teacher's own stream."""
        energy = torch.cat([part.float().square().sum(1) for part in entered.x.split(ROWS)])
        weights, count = bounded(energy), len(entered.x)
        sample = torch.arange(min(SAMPLE, count)) * count // min(SAMPLE, count)
        return cls(entered, teacher, weights, statistics(entered.x, teacher, weights, device), sample)


@torch.no_grad()
def ptq_expert(
    experts: Experts,
    number: int,
    path: str,
    one: Routed | None,
    inputs: LayerInputs,
    formats: dict[str, LayerFormat],
    config: PtqConfig,
    device: torch.device,
) -> tuple[dict[str, tuple[Binarized, BinaryLinear]], float, float]:
    """Stage 1 on one expert of the teacher's block. Returns the results by the layers' names in the block, and the
    expert's relative loss on its tokens when it is dense on the student's inputs, and when it is binarized.

    ``one``: the expert's rows, None where it has none; ``formats``: those of the block. Raises LbllmError naming a
    layer.
    """
    dense = experts.expert(number)
    student: nn.Module = share_copy(dense)
    x, target = inputs.entered.x, inputs.teacher
    rows = torch.zeros(0, dtype=torch.long) if one is None else one.rows
    names = [name for name, _ in dense.named_children() if name != "down_proj"]
    own = statistics(x[rows], target[rows], inputs.weights[rows], device)
    results = dict(_binarized(dense, student, path, names, own, inputs.all, formats, config))
    del own
    # The features of its own tokens, and of the sample.
    count, both = len(rows), torch.cat([rows, inputs.sample])
    seen, meant = (
        torch.cat([experts.inner(model, part.to(device).float()) for part in given[both].split(ROWS)])
        for model, given in ((student, x), (dense, target))
    )
    weights = bounded(seen.square().sum(1))
    own, prior = (
        statistics(seen[part], meant[part], weights[part], device) for part in (slice(count), slice(count, None))
    )
    results |= dict(_binarized(dense, student, path, ["down_proj"], own, prior, formats, config))
    probe = (rows if count else inputs.sample)[:PROBE_ROWS]
    wanted = experts.output(dense, target[probe].to(device).float())
    before, after = (
        float(token_error(experts.output(model, x[probe].to(device).float()), wanted)) for model in (dense, student)
    )
    return results, before, after


def _binarized(
    dense: nn.Module,
    student: nn.Module,
    path: str,
    names: list[str],
    own: Statistics,
    prior: Statistics,
    formats: dict[str, LayerFormat],
    config: PtqConfig,
) -> Iterator[tuple[str, tuple[Binarized, BinaryLinear]]]:
    """Binarize the named layers of an expert, which share an input; ``student`` gets their weights."""
    short = {name: formats[f"{path}.{name}"] for name in names if f"{path}.{name}" in formats}
    for fmt, same in by_format(names, short):
        hessian, drift = own.mean_with(prior)
        try:
            found = binarize_together(dense, same, hessian, fmt, config, drift)
        except LbllmError as error:
            raise LbllmError(f"{path}.{error}") from error
        for name, result in found.items():
            layer = to_layer(dense.get_submodule(name), fmt, result)
            set_linear_weight(student.get_submodule(name), rounded_weight(layer))
            yield f"{path}.{name}", (result, layer)


@torch.no_grad()
def add_expert_quantizers(
    experts: Experts,
    expert: nn.Module,
    one: Routed | None,
    entered: Entered,
    config: AarConfig,
    tail: int,
    device: torch.device,
) -> None:
    """Add quantizers with searched knees and clips to an expert of frozen ``BinaryLinear`` layers. An expert with less
    than ``config.search_tokens`` of its own is searched on others of the layer, too."""
    rows = torch.zeros(0, dtype=torch.long) if one is None else one.rows
    others = max(0, min(config.search_tokens, len(entered.x)) - len(rows))
    if others:
        rows = torch.cat([rows, torch.arange(others) * len(entered.x) // others])
    x = entered.x[rows[: config.search_tokens]].to(device).float()
    layers = {name: layer for name, layer in expert.named_children() if isinstance(layer, BinaryLinear)}
    for names in ([name for name in layers if name != "down_proj"], ["down_proj"]):
        if names == ["down_proj"]:
            x = experts.inner(expert, x)
        for bits in sorted({layers[name].fmt.act_bits for name in names if name in layers} - {16}):
            same = [layers[name] for name in names if name in layers and layers[name].fmt.act_bits == bits]
            quantizer = ActQuantizer(bits, tail, config.temperature, group_size=same[0].fmt.act_group_size).to(device)
            search_grid(quantizer, x, stacked_weights(same))
            for layer in same:
                layer.quantizer = quantizer


@dataclass
class Aim:
    """What the experts of a block train for. ``total`` (tokens, out): the sum of the student's experts, kept up to date
    while one after the other trains; ``wanted`` (tokens, out): what it should be; ``scale`` (tokens,): what a token's
    squared error is divided by."""

    total: Tensor
    wanted: Tensor
    scale: Tensor

    def of_expert(self, entered: Entered, one: Routed, own: Tensor) -> Tensor:
        """What the weighted outputs of an expert's rows should be, if all others stay: its own outputs ``own`` (rows,
        out), and what is missing to the aim."""
        tokens = entered.token[one.rows]
        return self.wanted[tokens] - self.total[tokens] + own

    def replace(self, entered: Entered, one: Routed, old: Tensor, new: Tensor) -> None:
        """Put an expert's new outputs (rows, out) into the sum."""
        self.total.index_add_(0, entered.token[one.rows], new - old)


def expert_loss(output: Tensor, wanted: Tensor, scale: Tensor, kind: str) -> Tensor:
    """Return the loss of weighted outputs (rows, out), a scalar, as ``token_error`` has it for a block's outputs."""
    error = (output.float() - wanted).square().sum(-1)
    return error.mean() / wanted.shape[-1] if kind == "mse" else (error / scale).mean()


def train_expert(
    experts: Experts,
    expert: nn.Module,
    one: Routed,
    entered: Entered,
    aim: Aim,
    own: Tensor,
    config: WatConfig | AarConfig,
    latents: dict[str, Tensor] | None,
    *,
    sequences: int,
    seed: int,
    device: torch.device,
    autocast: Any,
) -> Iterator[float]:
    """Train the frozen ``BinaryLinear`` layers of an expert on its tokens; yields the loss of each step, and freezes
    and rounds them at the end.

    ``own`` (rows, out): its weighted outputs before; ``latents``: for stage 2, by the layers' names in the expert;
    without them bits stay, and quantizers train too. ``sequences``: the number of sequences of the stage; a step has
    those of a step of the block, and the expert's rows in them. A step without rows, and one whose loss is not finite,
    changes nothing.
    """
    layers = binary_layers(expert)
    groups: list[dict[str, Any]] = []
    if latents is not None:
        assert isinstance(config, WatConfig)
        groups = thaw_layers(layers, latents, config)
    else:
        for layer in layers.values():
            scale = float(layer.expand(layer.params.dtype).std())
            groups.append({"params": [layer.params], "lr": config.lr_levels * scale})
    quantizers = quantizers_of(layers.values())
    if quantizers and isinstance(config, AarConfig):
        groups.append({"params": [quantizer.act for quantizer in quantizers], "lr": config.lr_act})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99), eps=1e-10, fused=True)
    base = [group["lr"] for group in optimizer.param_groups]
    tokens = entered.token[one.rows]
    length = entered.tokens // sequences
    wanted, factors, scales = aim.of_expert(entered, one, own), entered.factors(one), aim.scale[tokens]
    order = batch_order(sequences, max(1, config.batch_tokens // length), config.epochs, seed)
    for step, chosen in enumerate(order):
        picked = torch.isin(tokens // length, chosen).nonzero().flatten()
        if not len(picked):
            continue
        for group, rate in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = rate * cosine(step, len(order))
        for layer in layers.values():
            layer.expand_dense(product_dtype(autocast, layer.params))
        with autocast():
            output = experts.output(expert, entering(entered.x[one.rows[picked]], device))
            output = output * factors[picked].to(device)
        loss = expert_loss(output, wanted[picked].to(device), scales[picked].to(device), config.loss)
        loss.backward()
        shown = float(loss.detach())
        if loss.isfinite():
            beta, slope = _pull(config, layers.values(), step / max(1, len(order) - 1), device)
            update_layers([*layers.values()], quantizers, optimizer, config.grad_clip, beta, slope)
        for layer in layers.values():
            layer.gradient = layer.dense = None
        yield shown
        if not loss.isfinite():
            break
    with torch.no_grad():
        for layer in layers.values():
            layer.freeze()
            layer.round_params()


def _pull(
    config: WatConfig | AarConfig, layers: Iterable[BinaryLinear], progress: float, device: torch.device
) -> tuple[float, Tensor | None]:
    """The power of the polarization of relaxed bitmaps, and the derivative of the loss by it for each of them."""
    bitmaps = sum(layer.bitmap is not None for layer in layers)
    if not bitmaps:
        return 0.0, None
    assert isinstance(config, WatConfig)
    beta = config.beta_start + (config.beta_end - config.beta_start) * progress
    return beta, torch.full((), config.reg_weight / bitmaps, device=device)


def probe_loss(output: Tensor, wanted: Tensor, scale: Tensor) -> float:
    """Return the relative loss of an expert's weighted outputs (rows, out) on the first of its rows."""
    few = slice(PROBE_ROWS)
    return float(expert_loss(output[few], wanted[few], scale[few], "relative"))
