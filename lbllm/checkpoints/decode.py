"""Decoding on the CPU: all packed decoder blocks as one operator, and an output head that stays in bfloat16.

In a block of transformers' code a token goes through some sixty operators, and calling them takes longer than their
computation. If all blocks are like LLaMA's and their layers are packed, one token at a time goes through
``torch.ops.lbllm.decode`` instead, which wakes the other threads once a token; everything else, also prompts and
batches, runs the usual code, and both share the KV cache.

A checkpoint holds embeddings in bfloat16. Expanding them to float32 doubles the bytes read per token and
changes no value, so a model that computes in float32 keeps them as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lbllm import kernels, memory
from lbllm.quant.kv_cache import HalfKVLayer, PackedKVLayer, is_packed
from lbllm.quant.packed_layer import PackedLinear

NAMES = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))
# Blocks of transformers that compute what the operator computes: RMS norms before attention and MLP, rotary embedding
# by halves, grouped queries, a gated MLP; on queries and keys perhaps norms of their own.
BLOCKS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")


def speed_up(model: PreTrainedModel) -> None:
    """Let a loaded packed model decode by the operators above wherever they fit; the answers stay the same."""
    decoder: Any = model.base_model
    blocks = list(getattr(decoder, "layers", []))
    if blocks and all(map(_fits, blocks)) and decoder.config.hidden_act == "silu":
        decoder.forward = FusedForward(decoder)
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
    """The dtype in which the blocks compute; ``model.dtype`` is that of the embeddings."""
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


def _fits(block: nn.Module) -> bool:
    known = type(block).__name__ in BLOCKS and type(block).__module__.startswith("transformers.models.")
    return known and all(type(block.get_submodule(name)) is PackedLinear for name in NAMES)


class FusedForward:
    """The forward of a decoder (the model without its output head): one token of one sequence goes through the
    operator, everything else through the class's own forward."""

    def __init__(self, decoder: Any) -> None:
        self.decoder = decoder
        self.layers = [block.get_submodule(name) for block in decoder.layers for name in NAMES]
        self._lists: tuple[list[Any], ...] | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = None if args else self._cache_layers(**kwargs)
        if cache is None:
            if not args:
                self._let_keep_halves(kwargs)
            return type(self.decoder).forward(self.decoder, *args, **kwargs)
        embeds = kwargs.get("inputs_embeds")
        hidden = self.decoder.embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
        length = cache[0].length
        position = kwargs.get("position_ids")
        cosine, sine = self.decoder.rotary_emb(hidden, torch.tensor([[length]]) if position is None else position)
        words, *layers = self._weights()
        attention = self.decoder.layers[0].self_attn
        result: Tensor = torch.ops.lbllm.decode(
            hidden.float().contiguous(),
            cosine.float(),
            sine.float(),
            self._norms(),
            words,
            *layers,
            [part for layer in cache for part in layer.next_token()],
            length,
            attention.config.num_attention_heads,
            attention.config.num_key_value_heads,
            attention.scaling,
            self.decoder.norm.variance_epsilon,
        )
        for layer in cache:
            layer.length += 1
        return BaseModelOutputWithPast(
            last_hidden_state=result.to(hidden.dtype), past_key_values=kwargs["past_key_values"]
        )

    def _let_keep_halves(self, kwargs: dict[str, Any]) -> None:
        """If the KV cache keeps 16 bits: let an empty cache of transformers, or the one that it would make, keep its
        entries in layers that the operator reads."""
        cache, config = kwargs.get("past_key_values"), self.decoder.config
        if cache is None:
            wanted = kwargs.get("use_cache")
            if not (config.use_cache if wanted is None else wanted):
                return
        elif type(cache) is not DynamicCache or cache.offloading or is_packed(cache) or cache.get_seq_length() > 0:
            return
        if getattr(config, "sliding_window", None) is not None or not self._fits_here():
            return
        if cache is None:
            kwargs["past_key_values"] = Cache(layer_class_to_replicate=HalfKVLayer)
        else:
            cache.layers, cache.layer_class_to_replicate = [], HalfKVLayer

    def _norms(self) -> list[Tensor]:
        norms = []
        for block in self.decoder.layers:
            norms += [block.input_layernorm, block.post_attention_layernorm]
            if hasattr(block.self_attn, "q_norm"):
                norms += [block.self_attn.q_norm, block.self_attn.k_norm]
        return [norm.weight.float() for norm in (*norms, self.decoder.norm)]

    def _weights(self) -> tuple[list[Any], ...]:
        """The layers' words, parameters, scales, biases, quantizers, columns and group lengths, each as a list."""
        layers = self.layers
        # A layer that was saved or moved in between has restored its own bits and would hold them twice.
        if self._lists is None or any(
            layer.words is not words for layer, words in zip(layers, self._lists[0], strict=True)
        ):
            self._lists = None
            quantizers: list[float] = []
            for layer in layers:
                knee, low, high, bits, tail = (
                    (0.0, 0.0, 0.0, 0, 0) if layer.quantizer is None else layer.quantizer.settings()
                )
                quantizers += [bits, tail, knee, low, high, layer.range_length]
            self._lists = (
                [layer.arranged() for layer in layers],
                [layer.params for layer in layers],
                [layer.affine() for layer in layers],
                [layer.bias for layer in layers],
                quantizers,
                [layer.in_features for layer in layers],
                [layer.length for layer in layers],
            )
            # The bits were read from the checkpoint's file again.
            memory.trim()
        return self._lists

    def _cache_layers(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> list[PackedKVLayer] | None:
        """The cache's layers if the operator can do this call, else None."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        if given is None or (input_ids is not None and inputs_embeds is not None) or given.shape[:2] != (1, 1):
            return None
        if not self._fits_here():
            return None
        config = self.decoder.config
        # A call that asks for more than the last state runs the class's own code.
        if use_cache is False or config.output_hidden_states or config.output_attentions:
            return None
        if any(value for name, value in others.items() if name != "return_dict"):
            return None
        layers = getattr(past_key_values, "layers", [])
        blocks = self.decoder.layers
        if len(layers) != len(blocks) or any(block._forward_hooks or block._forward_pre_hooks for block in blocks):
            return None
        for layer in layers:
            if not isinstance(layer, PackedKVLayer) or layer.length == 0:
                return None
        length = layers[0].length
        # A head of odd length leaves half a byte, and a batch has more than one sequence.
        if layers[0].rooms[0][0].shape[0] != 1 or blocks[0].self_attn.head_dim % 2:
            return None
        if attention_mask is not None:
            every = isinstance(attention_mask, Tensor) and attention_mask.shape == (1, length + 1)
            if not every or not bool(attention_mask.all()):
                return None
        window = getattr(config, "sliding_window", None)
        if window is not None and length + 1 > window:
            return None
        return layers

    def _fits_here(self) -> bool:
        """Whether the operator could compute what the model does now."""
        usual = self.decoder.device.type == "cpu" and self.decoder.dtype != torch.float64
        return usual and not torch.is_grad_enabled() and kernels.ready()
