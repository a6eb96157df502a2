"""The experts of a mixture as layers of their own.

transformers keeps the experts of a block in fused parameters with three dimensions, whose form differs from family to
family. ``split_experts`` puts one module for each expert in their place, with linear layers ``gate_proj``, ``up_proj``
and ``down_proj``. So an expert's matrices have names, such as ``mlp.experts.3.up_proj``, and are binarized, stored and
computed like any other layer. The router and what else stands beside the experts stays as it is.

    split_experts(model)                 changes the model in place; the layers are views of its fused parameters
    experts_of(block)                    the path and the ``Experts`` of a block; None where it has none

The form is what transformers itself says of it (``use_experts_implementation``), or that of Llama 4, whose experts get
all tokens, sorted. Experts of any other form are left alone, and ``blocks.check_supported`` refuses them by name.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations.moe import _default_apply_gate

_LAYER = re.compile(r"(?:^|\.)(\d+)\.(?:gate|up|down)_proj$")
_BIASES = ("gate_up_proj_bias", "up_proj_bias", "down_proj_bias")


@dataclass(frozen=True)
class Form:
    """How a family stores its experts. ``transposed``: (experts, in, out) instead of (experts, out, in); ``joined``:
    gate and up are one parameter, whose outputs alternate where it is ``interleaved``; ``sorted_tokens``: the experts
    are called with one part of the rows for each, all of the same length, and zero rows for tokens that are not
    theirs."""

    transposed: bool
    joined: bool
    interleaved: bool
    sorted_tokens: bool

    def parts(self, name: str, fused: Tensor) -> dict[str, Tensor]:
        """Views of one expert's weight (out, in) or bias (out,) for each of its layers, from its entry of the fused
        parameter ``name``."""
        weight = fused if fused.ndim == 1 or not self.transposed else fused.t()
        layer = name.removesuffix("_bias")
        if layer != "gate_up_proj":
            return {layer: weight}
        half = len(weight) // 2
        gate, up = (weight[::2], weight[1::2]) if self.interleaved else (weight[:half], weight[half:])
        return {"gate_proj": gate, "up_proj": up}

    def fused(self, name: str, parts: dict[str, Tensor]) -> Tensor:
        """The inverse of ``parts``, as a new tensor."""
        layer = name.removesuffix("_bias")
        if layer != "gate_up_proj":
            weight = parts[layer]
        elif self.interleaved:
            weight = torch.stack([parts["gate_proj"], parts["up_proj"]], 1).flatten(0, 1)
        else:
            weight = torch.cat([parts["gate_proj"], parts["up_proj"]])
        return weight if weight.ndim == 1 or not self.transposed else weight.t()


class Routed(NamedTuple):
    """The tokens of one expert: their ``rows`` in the layer's inputs, ascending, and their ``places`` among the chosen
    experts of each."""

    expert: int
    rows: Tensor
    places: Tensor


def form_of(module: nn.Module) -> Form | None:
    """Return the form of a module of fused experts; None if it is none, or of a form that is not known."""
    own = dict(module.named_parameters(recurse=False))
    first = "gate_up_proj" if "gate_up_proj" in own else "up_proj"
    weights = [own.get(first), own.get("down_proj")]
    if any(weight is None or weight.ndim != 3 for weight in weights):
        return None
    if set(own) - {first, "down_proj", *_BIASES} or any(map(_has_tensors, module.children())):
        return None
    taken = [*inspect.signature(inspect.unwrap(type(module).forward)).parameters][1:]
    declared = all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate", "has_bias"))
    if declared and len(taken) == 3 and not getattr(module, "has_post_expert_norm", False):
        has_bias = any(name in own for name in _BIASES)
        form = Form(bool(module.is_transposed), bool(module.has_gate), not module.is_concatenated, False)
        fits = module.has_bias == has_bias and form.joined == (first == "gate_up_proj")
    else:
        form = Form(True, True, False, True)
        fits = not declared and len(taken) == 1 and set(own) == {"gate_up_proj", "down_proj"}
    return form if fits and _fits(form, own, first) else None


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(), *module.buffers()))


def _fits(form: Form, own: dict[str, nn.Parameter], first: str) -> bool:
    """Whether the shapes are those of the form."""
    (count, *up), (other, *down) = own[first].shape, own["down_proj"].shape
    if form.transposed:
        up, down = up[::-1], down[::-1]
    inner = up[0] // 2 if form.joined else up[0]
    return count == other and down == [up[1], inner] and (not form.joined or up[0] % 2 == 0)


def linear_of(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """Return a linear layer of these very tensors; making it costs no initialization."""
    layer: Any = nn.Linear.__new__(nn.Linear)
    nn.Module.__init__(layer)
    layer.out_features, layer.in_features = weight.shape
    layer.weight = nn.Parameter(weight, requires_grad=False)
    layer.bias = None if bias is None else nn.Parameter(bias, requires_grad=False)
    linear: nn.Linear = layer
    return linear


class Expert(nn.Module):
    """The layers of one expert; ``gate_proj`` only where there is a gate."""

    def __init__(self, layers: dict[str, nn.Linear]) -> None:
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    @classmethod
    def of(cls, form: Form, fused: dict[str, Tensor]) -> Expert:
        """Return an expert whose layers are views of its entries of the fused parameters."""
        tensors: dict[str, dict[str, Tensor]] = {}
        for name, entry in fused.items():
            kind = "bias" if name.endswith("_bias") else "weight"
            for layer, part in form.parts(name, entry.detach()).items():
                tensors.setdefault(layer, {})[kind] = part
        order = [name for name in ("gate_proj", "up_proj", "down_proj") if name in tensors]
        return cls({name: linear_of(tensors[name]["weight"], tensors[name].get("bias")) for name in order})


class Experts(nn.Module):
    """All experts of a block: children named by their numbers, ``rule`` for how a gate is applied.

    Only the experts that a token has chosen compute it. ``source``: makes one expert when it is needed, where the
    children are shapes alone; an expert then exists only while it computes.
    """

    def __init__(self, rule: nn.Module, form: Form, experts: list[Expert]) -> None:
        super().__init__()
        self.form, self.count, self.rule = form, len(experts), rule
        self.own_gate = getattr(type(rule), "_apply_gate", _default_apply_gate) is not _default_apply_gate
        for number, expert in enumerate(experts):
            self.add_module(str(number), expert)
        self.source: Callable[[int], Expert] | None = None

    @classmethod
    def of(cls, module: nn.Module, form: Form) -> Experts:
        """Return the experts of a fused module, whose parameters it takes away."""
        own = dict(module.named_parameters(recurse=False))
        count = len(own["down_proj"])
        experts = [Expert.of(form, {name: tensor[k] for name, tensor in own.items()}) for k in range(count)]
        for name in own:
            delattr(module, name)
        module._is_hf_initialized = True  # type: ignore[assignment]  # it has nothing left to initialize
        return cls(module, form, experts)

    def expert(self, number: int) -> Any:
        """Return one expert, a module, with its weights."""
        return self.get_submodule(str(number)) if self.source is None else self.source(number)

    def put(self, number: int, expert: nn.Module) -> None:
        """Replace one expert."""
        self._modules[str(number)] = expert

    def inner(self, expert: Any, x: Tensor) -> Tensor:
        """Return the inputs (tokens, in) of an expert's ``down_proj`` for its inputs x (tokens, in)."""
        rule: Any = self.rule
        up = expert.up_proj(x)
        if not self.form.joined:
            result: Tensor = rule.act_fn(up)
            return result
        gate = expert.gate_proj(x)
        if not self.own_gate:
            result = rule.act_fn(gate) * up
        elif self.form.interleaved:
            result = rule._apply_gate(torch.stack([gate, up], -1).flatten(-2))
        else:
            result = rule._apply_gate(torch.cat([gate, up], -1))
        return result

    def output(self, expert: Any, x: Tensor) -> Tensor:
        """Return the outputs (tokens, out) of one expert for its inputs x (tokens, in), not yet weighted."""
        count = len(x)
        more = _few_sizes(count) - count if _compiles_products(x) else 0
        if more:
            x = torch.cat([x, x[-1:].expand(more, -1)])
        result: Tensor = expert.down_proj(self.inner(expert, x))
        return result[:count] if more else result

    def choices(self, x: Tensor, routing: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return the chosen experts (rows, k) of the rows of x, and the weights (rows, k) of their outputs. The number
        of experts stands for none."""
        if not self.form.sorted_tokens:
            return routing[0].reshape(len(x), -1), routing[1].reshape(len(x), -1)
        owner = torch.arange(self.count, device=x.device).repeat_interleave(len(x) // self.count)
        chosen = torch.where(x.any(-1), owner, self.count)
        return chosen[:, None], x.new_ones(len(x), 1)

    def forward(self, hidden_states: Tensor, *routing: Tensor, **named: Tensor) -> Tensor:
        """Return the weighted sum of the chosen experts' outputs for each row of ``hidden_states``."""
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        chosen, weights = self.choices(x, (*routing, *named.values()))
        result = torch.zeros_like(x)
        for number, rows, places in routed(chosen, self.count):
            part = self.output(self.expert(number), x[rows]) * weights[rows, places, None]
            result.index_add_(0, rows, part.to(result.dtype))
        return result.view_as(hidden_states)

    def extra_repr(self) -> str:
        """Return the number of experts as text."""
        return f"{self.count} experts"


def _compiles_products(x: Tensor) -> bool:
    """Whether the library that multiplies x compiles code for each new number of rows: oneDNN does for bfloat16."""
    return x.device.type == "cpu" and (x.dtype == torch.bfloat16 or torch.is_autocast_enabled("cpu"))


def _few_sizes(rows: int) -> int:
    """The next of a few numbers of rows, at most an eighth more: the code for a number takes about a megabyte, and is
    kept; experts have another number in each step."""
    step = 1 << max(0, rows.bit_length() - 4)
    return -(-rows // step) * step


def routed(chosen: Tensor, count: int) -> Iterator[Routed]:
    """Yield the tokens of each of ``count`` experts that has some, for the choices (rows, k) of all rows."""
    flat = chosen.reshape(-1)
    order = flat.argsort(stable=True)
    start = 0
    for number, tokens in enumerate(flat.bincount(minlength=count)[:count].tolist()):
        if tokens:
            part = order[start : start + tokens]
            yield Routed(number, part // chosen.shape[1], part % chosen.shape[1])
        start += tokens


def split_experts(model: nn.Module) -> None:
    """Put ``Experts`` in the place of all fused experts of a known form in a model; nothing is copied."""
    for name, module in list(model.named_modules()):
        form = form_of(module)
        if form is not None:
            model.set_submodule(name, Experts.of(module, form))


def experts_of(block: nn.Module) -> tuple[str, Experts] | None:
    """Return the path and the module of a block's experts; None if it has none."""
    return next(((name, module) for name, module in block.named_modules() if isinstance(module, Experts)), None)


def expert_count(block: nn.Module) -> int:
    """Return the number of a block's experts; 0 if it has none."""
    found = experts_of(block)
    return 0 if found is None else found[1].count


def expert_layers(block: nn.Module) -> set[str]:
    """Return the names of all modules inside a block's experts."""
    found = experts_of(block)
    return set() if found is None else {f"{found[0]}.{name}" for name, _ in found[1].named_modules() if name}


def expert_number(layer: str) -> int | None:
    """Return the number of the expert that a layer's name in its block is of; None for other layers."""
    found = _LAYER.search(layer)
    return None if found is None else int(found[1])


def layer_of(block: nn.Module, name: str) -> nn.Module:
    """Return a layer of a block by its name, with its weights, also where experts are made when they are needed."""
    found, number = experts_of(block), expert_number(name)
    if found is None or number is None or found[1].source is None or not name.startswith(f"{found[0]}.{number}."):
        return block.get_submodule(name)
    layer: nn.Module = found[1].expert(number).get_submodule(name.rpartition(".")[2])
    return layer


def routers(block: nn.Module) -> set[str]:
    """Return the names of the linear layers of a block that choose or weight experts: those in the module around the
    experts with one output, or with as many as there are experts, that are alone in their own module or stand right
    beside the experts."""
    found = experts_of(block)
    if found is None:
        return set()
    path, experts = found
    around = path.rpartition(".")[0]
    parent = block.get_submodule(around)
    linear = [name for name, module in parent.named_modules() if isinstance(module, nn.Linear)]
    last = path.rpartition(".")[2]
    linear = [name for name in linear if not name.startswith(f"{last}.")]
    chosen = set()
    for name in linear:
        owner = name.rpartition(".")[0]
        alone = not owner or sum(other.startswith(f"{owner}.") for other in linear) == 1
        layer: Any = parent.get_submodule(name)
        if alone and layer.out_features in (1, experts.count):
            chosen.add(f"{around}.{name}".removeprefix("."))
    return chosen


def read_parameters(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield the names and values of all parameters of a module, those of experts that are made when needed, too: one
    expert is in memory at a time."""
    lazy = [(name, one) for name, one in module.named_modules() if isinstance(one, Experts) and one.source is not None]
    inside = tuple(f"{name}.{number}." for name, one in lazy for number in range(one.count))
    for name, parameter in module.named_parameters():
        if not inside or not name.startswith(inside):
            yield name, parameter
    for name, experts in lazy:
        for number in range(experts.count):
            for key, parameter in experts.expert(number).named_parameters():
                yield f"{name}.{number}.{key}", parameter


@contextmanager
def answering(experts: Experts, answer: Callable[..., Tensor]) -> Iterator[None]:
    """Make the experts return ``answer`` of what they are called with, in place of what they compute."""
    experts.forward = answer  # type: ignore[method-assign]
    try:
        yield
    finally:
        del experts.forward


def silent(block: nn.Module) -> Any:
    """A context in which a block's experts, if it has some, compute nothing and return zeros."""
    found = experts_of(block)
    return _nothing() if found is None else answering(found[1], lambda hidden, *_, **__: torch.zeros_like(hidden))


@contextmanager
def _nothing() -> Iterator[None]:
    yield
