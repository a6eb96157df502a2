"""The decoder blocks of a loaded packed model, and whether they still compute what the decode operator computes.

A hook, a wrapper, an adapter, a parametrization or a replaced forward anywhere inside a block changes what the model
answers, and an operator that computes all blocks at once would pass it over. So every token asks first. The check reads
lists that are collected once, since walking through the modules takes longer than some tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from itertools import chain, repeat
from operator import is_, itemgetter
from pathlib import Path
from types import FunctionType
from typing import Any, Self

import torch
import transformers
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from lbllm.quant import kv_attention
from lbllm.quant.packed_layer import PackedLinear

NAMES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
# Blocks of transformers that compute what the operator computes: RMS norms before attention and MLP, rotary embedding
# by halves, grouped queries, a gated MLP; on queries and keys perhaps norms of their own.
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_LIBRARIES = ("torch.nn.", "transformers.", "lbllm.")
_FOLDERS = (*map(Path, (*torch.__path__, *transformers.__path__)), Path(__file__).parents[1])
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_EVERYWHERE = (
    torch_module._global_forward_hooks,
    torch_module._global_forward_pre_hooks,
    torch_module._global_backward_hooks,
    torch_module._global_backward_pre_hooks,
)
_CALL = nn.Module.__call__
_ATTENTION = {name: ALL_ATTENTION_FUNCTIONS.get(name) for name in ("sdpa", "eager", kv_attention.NAME)}


class Structure:
    """The modules of a decoder's blocks and its last norm. ``of`` makes one, ``holds`` is the check of every token.

    ``layers``: the packed layers, for each block those of ``NAMES``.
    """

    def __init__(self, decoder: Any) -> None:
        blocks = list(decoder.layers)
        self.layers: list[PackedLinear] = [block.get_submodule(name) for block in blocks for name in NAMES]
        attentions = [block.self_attn for block in blocks]
        norms: list[nn.Module] = []
        for block in blocks:
            norms += [block.input_layernorm, block.post_attention_layernorm]
            if hasattr(block.self_attn, "q_norm"):
                norms += [block.self_attn.q_norm, block.self_attn.k_norm]
        norms.append(decoder.norm)
        # A quantizer's own hooks are never called, since the kernels quantize.
        inside = [part for layer in self.layers for part in layer.modules() if part is not layer]
        hidden = set(map(id, inside))
        modules = [module for block in blocks for module in block.modules() if id(module) not in hidden]
        self._modules: list[nn.Module] = [decoder.layers, *modules, decoder.norm]
        self._types: list[type[nn.Module]] = [*map(type, self._modules)]
        self._hooks = [getattr(module, name) for module in self._modules for name in _HOOKS]
        self._attributes = [module.__dict__ for module in self._modules]
        self._decoder = decoder._modules
        self._children = [module._modules for module in self._modules if module._modules]
        self._known = [*chain.from_iterable(map(dict.values, self._children))]
        self._forwards = [(kind, kind.forward) for kind in set(self._types)]
        self._globals = [entry for kind in set(self._types) for entry in _globals_of(kind)]
        self._settings = [_settings_of(module) for module in (*attentions, *norms)]
        self._dropout = [module.__dict__ for module in attentions if module.attention_dropout]
        self._norms = [norm._parameters for norm in norms]
        self._biases = [layer._parameters for layer in self.layers]
        self._quantizers = [layer.quantizer._parameters for layer in self.layers if layer.quantizer is not None]

    @classmethod
    def of(cls, decoder: Any) -> Self | None:
        """The structure of a decoder; None if its blocks are not those of a library, like LLaMA's, and packed."""
        blocks = list(getattr(decoder, "layers", []))
        if not blocks or not all(map(_fits, blocks)) or decoder.config.hidden_act != "silu":
            return None
        kinds = {type(module) for part in (*blocks, decoder.norm) for module in part.modules()}
        if not all(map(_is_of_a_library, kinds)):
            return None
        norms = [module for module in decoder.modules() if "variance_epsilon" in module.__dict__]
        same = len({norm.variance_epsilon for norm in norms}) == 1
        same &= len({(block.self_attn.scaling, block.self_attn.head_dim) for block in blocks}) == 1
        same &= [block.self_attn.layer_idx for block in blocks] == [*range(len(blocks))]
        return cls(decoder) if same else None

    def holds(self, config: Any) -> bool:
        """Return whether nothing in the blocks has changed since, and nothing listens to them."""
        attention = config._attn_implementation
        return (
            not any(self._hooks)
            and not any(_EVERYWHERE)
            and self._decoder["layers"] is self._modules[0]
            and self._decoder["norm"] is self._modules[-1]
            and len(self._modules[0]._modules) == config.num_hidden_layers
            and _same(chain.from_iterable(map(dict.values, self._children)), self._known)
            and _same(map(type, self._modules), self._types)
            and not any(map(dict.__contains__, self._attributes, repeat("forward")))
            and all(kind.forward is forward for kind, forward in self._forwards)
            and all(names.get(name) is value for names, name, value in self._globals)
            and nn.Module.__call__ is _CALL
            and all(read(names) == value for read, names, value in self._settings)
            and not any(names["training"] for names in self._dropout)
            and attention in _ATTENTION
            and ALL_ATTENTION_FUNCTIONS.get(attention) is _ATTENTION[attention]
        )

    def norms(self) -> list[Tensor] | None:
        """The weights of the norms in the order that the operator takes, float32; None if one has no parameter."""
        weights = [names.get("weight") for names in self._norms]
        found = [_single(weight) for weight in weights if weight is not None]
        return found if len(found) == len(weights) else None

    def biases(self) -> list[Tensor | None]:
        """The layers' biases; None for a layer without one."""
        return [names.get("bias") for names in self._biases]

    def quantizers(self) -> list[Tensor]:
        """Knee and clips (3,) of the layers that have a quantizer."""
        return [act for names in self._quantizers if (act := names["act"]) is not None]


def _same(these: Iterable[object], those: list[Any]) -> bool:
    found = [*these]
    return len(found) == len(those) and all(map(is_, found, those))


def _single(weight: Tensor) -> Tensor:
    return weight if weight.dtype == torch.float32 else weight.float()


def _fits(block: nn.Module) -> bool:
    known = type(block).__name__ in BLOCKS and type(block).__module__.startswith("transformers.models.")
    known = known and type(_submodule(block, "mlp.act_fn")).__name__ in ("SiLU", "SiLUActivation")
    return known and all(type(_submodule(block, name)) is PackedLinear for name in NAMES)


def _submodule(block: nn.Module, name: str) -> nn.Module | None:
    try:
        return block.get_submodule(name)
    except AttributeError:
        return None


def _is_of_a_library(kind: type[nn.Module]) -> bool:
    """Whether a module's class is of PyTorch, transformers or this project, and its forward was not replaced."""
    called = [value for _, _, value in _globals_of(kind) if isinstance(value, FunctionType)]
    return kind.__module__.startswith(_LIBRARIES) and all(map(_stands_in_a_library, (kind.forward, *called)))


def _stands_in_a_library(function: Any) -> bool:
    code = getattr(function, "__code__", None)
    return code is not None and any(Path(code.co_filename).is_relative_to(folder) for folder in _FOLDERS)


def _globals_of(kind: type[nn.Module]) -> list[tuple[dict[str, Any], str, object]]:
    """The functions that a class's forward calls by name: where each stands, its name, and what it is now."""
    forward: Any = kind.forward
    names = forward.__globals__
    return [(names, name, names[name]) for name in forward.__code__.co_names if callable(names.get(name))]


def _settings_of(module: nn.Module) -> tuple[Callable[[Any], object], dict[str, Any], object]:
    """How to read a module's numbers, for example a norm's epsilon; where; and what they are now."""
    names = module.__dict__
    plain = (int, float, str, bool, type(None))
    read = itemgetter(
        *(name for name, value in names.items() if isinstance(value, plain) and name[0] != "_" and name != "training")
    )
    return read, names, read(names)
