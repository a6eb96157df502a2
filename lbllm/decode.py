"""Decoding on the CPU: a packed decoder block as one operator, and an output head that stays in bfloat16.

A token passes some sixty operators in a block of transformers' code, and calling them takes longer than what they
compute. Where a block is of LLaMA's kind and all of its layers are packed, one token at a time goes through
``torch.ops.lbllm.decode_block`` instead; everything else, prompts and batches included, takes the usual way, and both
ways share the KV cache.

A checkpoint holds embeddings in bfloat16. Expanding them to float32 doubles what is read for every token and changes
no value, so a model that computes in float32 keeps them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm import kernels
from lbllm.activations import PackedKVLayer
from lbllm.layers import PackedLinear

NAMES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
# Blocks of transformers that compute what the operator computes: RMS norms before attention and MLP, rotary embedding
# by halves, grouped queries, a gated MLP; on queries and keys perhaps norms of their own.
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def speed_up(model: PreTrainedModel) -> None:
    """Let a loaded packed model decode by the operators above wherever they fit; the answers stay the same."""
    for block in model.modules():
        known = type(block).__name__ in BLOCKS and type(block).__module__.startswith("transformers.models.")
        gated = known and model.config.hidden_act == "silu"
        if gated and all(type(block.get_submodule(name)) is PackedLinear for name in NAMES):
            block.forward = FusedForward(block)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if type(head) is not nn.Linear or head.bias is not None or type(embedding) is not nn.Embedding:
        return
    weights = (embedding.weight, head.weight)
    if any(weight.dtype != torch.float32 for weight in weights):
        return
    halves = [weight.data.bfloat16() for weight in weights]
    if all(torch.equal(half.float(), weight) for half, weight in zip(halves, weights, strict=True)):
        tied = embedding.weight is head.weight
        embedding.weight = nn.Parameter(halves[0], requires_grad=False)
        head.weight = embedding.weight if tied else nn.Parameter(halves[1], requires_grad=False)
        embedding.register_forward_hook(_as_float)
        head.forward = HalfHead(head)


def computing_dtype(model: PreTrainedModel) -> torch.dtype:
    """What the model's blocks compute in: ``model.dtype`` is that of its embeddings."""
    head = model.get_output_embeddings()
    return torch.float32 if head is not None and isinstance(head.forward, HalfHead) else model.dtype


def _as_float(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    return output.float()


class HalfHead:
    """The forward of an output head whose weight (vocabulary, hidden) is bfloat16; input and output are float32."""

    def __init__(self, head: nn.Linear) -> None:
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        weight = self.head.weight
        fits = x.device.type == "cpu" and weight.dtype == torch.bfloat16
        if fits and not torch.is_grad_enabled() and kernels.ready():
            result: Tensor = torch.ops.lbllm.bfloat16_linear(x, weight)
            return result
        return nn.functional.linear(x, weight.to(x.dtype))


class FusedForward:
    """The forward of a block: one token of one sequence goes through the operator, all else through the class's own."""

    def __init__(self, block: Any) -> None:
        self.block = block
        self._constant: tuple[Any, ...] | None = None

    def __call__(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        layer = self._cache_layer(hidden_states, kwargs) if not args else None
        if layer is None:
            output: Tensor = type(self.block).forward(self.block, hidden_states, *args, **kwargs)
            return output
        attention = self.block.self_attn
        layers = [self.block.get_submodule(name) for name in NAMES]
        cosine, sine = kwargs["position_embeddings"]
        norms = [self.block.input_layernorm, self.block.post_attention_layernorm]
        if hasattr(attention, "q_norm"):
            norms += [attention.q_norm, attention.k_norm]
        length = layer.get_seq_length()
        rooms = []
        for which, store in enumerate(layer.stores):
            assert store is not None
            rooms.append(layer.reserve(which, (store[0][..., :1, :], store[1][..., :1, :])))
        result: Tensor = torch.ops.lbllm.decode_block(
            hidden_states.float(),
            cosine.float(),
            sine.float(),
            [norm.weight.float() for norm in norms],
            [layer.arranged() for layer in layers],
            [layer.params for layer in layers],
            [layer.params_scale for layer in layers],
            [layer.bias for layer in layers],
            *self._numbers(layers),
            [*rooms[0], *rooms[1]],
            length,
            attention.config.num_attention_heads,
            attention.config.num_key_value_heads,
            attention.scaling,
            self.block.input_layernorm.variance_epsilon,
        )
        for which, room in enumerate(rooms):
            layer.stores[which] = room[0][..., : length + 1, :], room[1][..., : length + 1, :]
        return result.to(hidden_states.dtype)

    def _numbers(self, layers: list[Any]) -> tuple[Any, ...]:
        """The layers' quantizers, columns and group lengths, which never change."""
        if self._constant is None:
            quantizers: list[float] = []
            for layer in layers:
                knee, low, high, bits, tail = (
                    (0.0, 0.0, 0.0, 0, 0) if layer.quantizer is None else layer.quantizer.settings()
                )
                quantizers += [bits, tail, knee, low, high]
            self._constant = (
                quantizers,
                [layer.in_features for layer in layers],
                [layer.length for layer in layers],
            )
        return self._constant

    def _cache_layer(self, hidden: Tensor, kwargs: dict[str, Any]) -> PackedKVLayer | None:
        """The cache's layer of this block where this call is one for the operator, else None."""
        if hidden.shape[:2] != (1, 1) or hidden.device.type != "cpu" or hidden.dtype == torch.float64:
            return None
        if torch.is_grad_enabled() or kwargs.get("attention_mask") is not None or kwargs.get("output_attentions"):
            return None
        cache, index = kwargs.get("past_key_values"), self.block.self_attn.layer_idx
        if cache is None or index >= len(cache.layers) or not kernels.ready():
            return None
        layer = cache.layers[index]
        if not isinstance(layer, PackedKVLayer) or layer.bits != 4 or layer.stores[0] is None:
            return None
        # A head of odd length leaves half a byte, and a batch has more than one sequence.
        fits = layer.stores[0][0].shape[0] == 1 and self.block.self_attn.head_dim % 2 == 0
        return layer if fits else None
