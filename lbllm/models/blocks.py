"""Find the decoder blocks of any Hugging Face causal language model, capture their inputs, and run them.

Everything is found by structure, so a new architecture needs no entry in a list: the decoder is the module list with
the most parameters, and the layers to binarize are its linear layers.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from lbllm.errors import ConfigError, ModelError
from lbllm.models.calls import BlockCall, call_arguments, of_batch, with_repeated
from lbllm.models.experts import Experts, expert_layers, routers

# The largest share of a block's weights that may be in matrices outside linear layers.
DENSE_SHARE = 0.1


def decoder_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """Return the path of the decoder's block list in ``model``, and the list. Raises ModelError if there is none."""
    best: tuple[str, nn.ModuleList] | None = None
    most = 0
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) and all(linear_layers(block) for block in module):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > most:
                best, most = (name, module), size
    if best is None:
        raise ModelError(f"{type(model).__name__} has no list of decoder blocks with linear layers in it")
    return best


def linear_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a block by their name in it, with GPT-2's Conv1D (stored transposed) and those of
    experts, but without the routers that choose experts."""
    found: dict[str, nn.Module] = {
        name: module for name, module in block.named_modules() if isinstance(module, nn.Linear | Conv1D)
    }
    kept = routers(block)
    return {name: layer for name, layer in found.items() if name not in kept} if kept else found


def outer_layers(block: nn.Module) -> dict[str, nn.Module]:
    """Return the linear layers of a block that every token reaches: all but those of experts."""
    inside = expert_layers(block)
    return {name: layer for name, layer in linear_layers(block).items() if name not in inside}


def linear_weight(layer: nn.Module) -> Tensor:
    """Return the weight of a linear layer as a view of shape (out, in); Conv1D stores it transposed."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight.t() if isinstance(layer, Conv1D) else weight


def set_linear_weight(layer: nn.Module, weight: Tensor) -> None:
    """Replace the weight of a linear layer by a new parameter with the values (out, in), in the old dtype."""
    old = layer.weight
    assert isinstance(old, Tensor)
    stored = weight.t() if isinstance(layer, Conv1D) else weight
    layer.weight = nn.Parameter(stored.to(old.dtype).contiguous(), requires_grad=False)


def check_supported(model: PreTrainedModel) -> None:
    """Raise ModelError, with the largest parameter's name, if more than ``DENSE_SHARE`` of a block's weights are in
    matrices outside linear layers, like experts of a form that is not known, if a block has a list of sub-modules or
    two mixtures of experts, or if the model changes its own weights.

    Smaller ones, like the state matrices of a state-space model, stay dense.
    """
    path, blocks = decoder_blocks(model)
    every = getattr(model.config, "rescale_every", 0)
    if every:
        raise ModelError(
            f"{type(model).__name__} divides its own weights by two at every {every} blocks while it computes, which "
            'packed weights can\'t be; set "rescale_every" to 0 in its config.json'
        )
    for index, block in enumerate(blocks):
        inside = {id(parameter) for layer in linear_layers(block).values() for parameter in layer.parameters()}
        outside = {
            name: parameter
            for name, parameter in block.named_parameters()
            if id(parameter) not in inside and parameter.ndim >= 2 and min(parameter.shape[-2:]) > 1
        }
        share = sum(map(Tensor.numel, outside.values())) / sum(map(Tensor.numel, block.parameters()))
        if share > DENSE_SHARE:
            name, parameter = max(outside.items(), key=lambda entry: entry[1].numel())
            raise ModelError(
                f"{type(model).__name__}: {share:.0%} of the weights of {path}.{index} are not in linear layers, most "
                f"of them in {name} of shape {tuple(parameter.shape)}, and could not be binarized. Experts of this "
                "form and other fused weights are not supported; choose another model of the same family"
            )
        if sum(isinstance(module, Experts) for module in block.modules()) > 1:
            raise ModelError(
                f"{type(model).__name__}: {path}.{index} has two mixtures of experts, which is not supported; choose "
                "another model of the same family"
            )
        if any(isinstance(module, nn.ModuleList) for module in block.modules()):
            raise ModelError(
                f"{type(model).__name__}: {path}.{index} contains lists of sub-modules, whose use is not known; choose "
                "another model of the same family"
            )


def context_length(model: PreTrainedModel) -> int | None:
    """Return the model's context length in tokens, or None if its config has none."""
    known = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return known if isinstance(known, int) and known > 0 else None


def check_length(model: PreTrainedModel, tokens: int, setting: str) -> None:
    """Raise ConfigError, with the setting's name, if ``tokens`` is more than the model's context length."""
    known = context_length(model)
    if known is not None and known < tokens:
        raise ConfigError(
            f"{setting} {tokens} is more than the model's context of {known} tokens; choose at most {known}"
        )


class Captured(Exception):
    """Ends a forward pass early; whoever starts the pass catches it."""


@torch.no_grad()
def capture_calls(model: PreTrainedModel, sequence: Tensor, count: int | None = None) -> list[BlockCall]:
    """Return the arguments, without the hidden states, of the calls of the first ``count`` blocks (default: all).

    ``sequence``: token ids (1, T). The arguments depend only on positions, masks and the number of sequences, so they
    are valid for every batch of length T in ``run_block``.
    """
    blocks = decoder_blocks(model)[1][:count]
    calls: list[BlockCall] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls.append(call_arguments(block, args, kwargs)[1])
        if len(calls) % len(blocks) == 0:
            raise Captured  # the output layer of a large vocabulary would need more memory than all blocks

    for ids in (sequence, sequence.repeat(2, 1)):
        _pass(model, ids, [block.register_forward_pre_hook(keep, with_kwargs=True) for block in blocks])
    return [with_repeated(*both) for both in zip(calls[: len(blocks)], calls[len(blocks) :], strict=True)]


def _pass(model: PreTrainedModel, sequence: Tensor, handles: list[RemovableHandle]) -> None:
    """Run one forward pass for its hooks, then remove them; a hook may end the pass by raising Captured."""
    try:
        model(input_ids=sequence, use_cache=False)
    except Captured:
        pass
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def first_inputs(model: PreTrainedModel, sequences: Tensor, batch: int) -> Tensor:
    """Return the input (n, T, hidden) of the first block for token ids (n, T)."""
    return torch.cat(list(embedded_batches(model, sequences, batch, model.device)))


@torch.no_grad()
def embedded_batches(model: PreTrainedModel, sequences: Tensor, batch: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the input (b, T, hidden) of the first block for token ids (n, T), ``batch`` sequences at a time."""
    _, blocks = decoder_blocks(model)
    box: list[Tensor] = []

    def keep(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        box.append(call_arguments(block, args, kwargs)[0])
        raise Captured

    handle = blocks[0].register_forward_pre_hook(keep, with_kwargs=True)
    try:
        for part in sequences.split(batch):
            with suppress(Captured):
                model(input_ids=part.to(device), use_cache=False)
            yield box.pop()
    finally:
        handle.remove()


def run_block(block: nn.Module, hidden: Tensor, call: BlockCall, cache: Any = None) -> Tensor:
    """Return the block's output (b, T, hidden) for hidden states (b, T, hidden); ``cache`` replaces the KV cache of a
    block that has one."""
    if cache is not None:
        prepare = getattr(cache, "prepare", None)
        if prepare is not None:
            prepare(block)
        names = inspect.signature(block.forward).parameters
        name = next((name for name in ("past_key_values", "layer_past", "past_key_value") if name in names), None)
        call = call if name is None else call | {name: cache}
    output = block(hidden, **of_batch(call, len(hidden)))
    return output if isinstance(output, Tensor) else output[0]


def entering(hidden: Tensor, device: torch.device) -> Tensor:
    """Return hidden states (..., hidden) as a block takes them: in float32 (float64 stays float64), on its device.

    The stream of all tokens may be bfloat16 and stays in main memory or in a file.
    """
    return hidden.to(device, torch.promote_types(hidden.dtype, torch.float32))


def device_of(block: nn.Module) -> torch.device:
    """Return the device of a block's parameters."""
    return next(parameter.device for parameter in block.parameters() if parameter.device.type != "meta")


def run_batches(block: nn.Module, hidden: Tensor, call: BlockCall, batch: int, cache: Any = None) -> Iterator[Tensor]:
    """Yield the block's outputs for hidden states (n, T, hidden), ``batch`` sequences at a time, on its device."""
    device = device_of(block)
    for part in hidden.split(batch):
        yield run_block(block, entering(part, device), call, cache)


@torch.no_grad()
def shared_inputs(block: nn.Module, hidden: Tensor, call: BlockCall) -> list[list[str]]:
    """Return the names of the linear layers in the order of their first use; layers with the same input are one list.

    ``hidden``: one sequence (1, T, hidden) to run the block on. Layers that the block never calls are not included, nor
    those of experts.
    """
    order: list[tuple[Tensor, list[str]]] = []

    def hook(name: str) -> Any:
        def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if any(name in names for _, names in order):
                return
            for tensor, names in order:
                if tensor is args[0]:
                    names.append(name)
                    return
            order.append((args[0], [name]))

        return keep

    handles = [layer.register_forward_pre_hook(hook(name)) for name, layer in outer_layers(block).items()]
    try:
        run_block(block, entering(hidden, device_of(block)), call)
    finally:
        for handle in handles:
            handle.remove()
    return [names for _, names in order]


@torch.no_grad()
def layer_inputs(
    block: nn.Module, layer: str, hidden: Tensor, call: BlockCall, batch: int, cache: Any = None
) -> Iterator[Tensor]:
    """Yield the input (tokens, in) of one linear layer for each batch; the block stops at this layer."""
    box: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> None:
        box.append(args[0])
        raise Captured

    for part in hidden.split(batch):
        # The hook is removed between batches, because the caller may run the block there.
        handle = block.get_submodule(layer).register_forward_pre_hook(keep)
        try:
            run_block(block, entering(part, device_of(block)), call, cache)
        except Captured:
            pass
        finally:
            handle.remove()
        yield box.pop().flatten(0, -2)


@contextmanager
def recorded_inputs(
    block: nn.Module, layers: Iterable[str], collected: Callable[[], Any] = list
) -> Iterator[dict[str, Any]]:
    """Record the inputs of the named linear layers while a block runs: bfloat16 (tokens, in) for each batch.

    ``collected`` makes what the inputs of a layer are appended to: a list, or ``lbllm.streams.Rows``.
    """
    records: dict[str, Any] = {name: collected() for name in layers}
    reached: set[str] = set()

    def keep(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            if name not in reached:  # only the first call in a batch, as in layer_inputs
                records[name].append(args[0].detach().flatten(0, -2).bfloat16())
                reached.add(name)

        return hook

    handles = [block.get_submodule(name).register_forward_pre_hook(keep(name)) for name in records]
    handles.append(block.register_forward_pre_hook(lambda *_: reached.clear()))
    try:
        yield records
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def all_inputs(block: nn.Module, hidden: Tensor, call: BlockCall, batch: int) -> dict[str, list[Tensor]]:
    """Return ``recorded_inputs`` of all linear layers of a block for hidden states (n, T, hidden)."""
    with recorded_inputs(block, linear_layers(block)) as records:
        for _ in run_batches(block, hidden, call, batch):
            pass
    return records


def share_copy(module: nn.Module) -> Any:
    """Return a copy of a module tree that shares its parameters and buffers with the original."""
    tensors = {id(tensor): tensor for tensor in (*module.parameters(), *module.buffers())}
    return copy.deepcopy(module, tensors)


FORWARD_TOKENS = 2_048
