"""Decoding on the CPU: all packed decoder blocks as one operator, and an output head that stays in bfloat16.

In a block of transformers' code a token goes through some sixty operators, and calling them takes longer than their
computation. If all blocks are like LLaMA's and their layers are packed, one token at a time goes through
``torch.ops.lbllm.decode`` instead, which wakes the other threads once a token; everything else, also prompts and
batches, runs the usual code, and both share the KV cache. A model whose blocks were changed or are listened to, by a
hook, an adapter or a wrapper, runs the usual code alone: ``lbllm.checkpoints.structure`` looks at every token.

A checkpoint holds embeddings in bfloat16. Expanding them to float32 doubles the bytes read per token and
changes no value, so a model that computes in float32 keeps them as they are.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Cache, DynamicCache, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from lbllm import kernels, memory
from lbllm.checkpoints.structure import Structure
from lbllm.quant.kv_cache import HalfKVLayer, PackedKVLayer
from lbllm.quant.model_cache import is_packed
from lbllm.quant.packed_layer import Arranged

# What a forward is called with, and changes nothing of its states: generate() passes its tokenizer on.
_UNREAD = ("return_dict", "tokenizer")


def speed_up(model: PreTrainedModel) -> None:
    """Let a loaded packed model decode by the operators above wherever they fit; the answers stay the same."""
    decoder: Any = model.base_model
    structure = Structure.of(decoder)
    if structure is not None:
        decoder.forward = FusedForward(decoder, structure)
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


class Operands(NamedTuple):
    """What the operator takes of the packed layers, each as a list over the layers.

    ``arranged``: their bits; ``acts``: knee and clips of all quantizers (count, 3), of which ``quantizers`` was made;
    None without quantizers.
    """

    arranged: list[Arranged]
    scales: list[Tensor | None]
    tables: list[Tensor | None]
    acts: Tensor | None
    quantizers: list[float]
    columns: list[int]
    lengths: list[int]


class FusedForward:
    """The forward of a decoder (the model without its output head): one token of one sequence goes through the
    operator, everything else through the class's own forward."""

    def __init__(self, decoder: Any, structure: Structure) -> None:
        self.decoder = decoder
        self._structure: Structure | Literal[False] | None = structure  # False: the blocks don't fit; None: of a copy
        self._operands: Operands | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a copy or a pickle holds; a copy looks at its own decoder."""
        return {"decoder": self.decoder, "_structure": None, "_operands": None}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        cache = None if args else self._cache_layers(**kwargs)
        weights = None if cache is None else self._weights()
        if cache is None or weights is None:
            if not args:
                self._let_keep_halves(kwargs)
            return type(self.decoder).forward(self.decoder, *args, **kwargs)
        embeds = kwargs.get("inputs_embeds")
        hidden = self.decoder.embed_tokens(kwargs["input_ids"]) if embeds is None else embeds
        length = cache[0].length
        position = kwargs.get("position_ids")
        cosine, sine = self.decoder.rotary_emb(hidden, torch.tensor([[length]]) if position is None else position)
        attention = self.decoder.layers[0].self_attn
        result: Tensor = torch.ops.lbllm.decode(
            hidden.float().contiguous(),
            cosine.float(),
            sine.float(),
            *weights,
            [part for layer in cache for part in layer.next_token()],
            length,
            attention.config.num_attention_heads,
            attention.config.num_key_value_heads,
            attention.scaling,
            self.decoder.norm.variance_epsilon,
            *cache[0].groups,
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
        if getattr(config, "sliding_window", None) is not None or not self._fits_here() or not self._is_untouched():
            return
        if cache is None:
            kwargs["past_key_values"] = Cache(layer_class_to_replicate=HalfKVLayer)
        else:
            cache.layers, cache.layer_class_to_replicate = [], HalfKVLayer

    def _weights(self) -> tuple[list[Any], ...] | None:
        """The norms, then the layers' words, parameters, scales, tables, biases, quantizers, columns and group lengths,
        each as a list; None if the operator can't read one of them."""
        assert self._structure
        norms, layers, known = self._structure.norms(), self._structure.layers, self._operands
        acts = self._structure.quantizers()
        act = torch.stack(acts) if acts else None
        # A layer that was saved or moved in between has restored its own bits and would hold them twice.
        if known is None or not all(
            layer.__dict__["_arranged"] is arranged and layer.holds(arranged)
            for layer, arranged in zip(layers, known.arranged, strict=True)
        ):
            known = None
        if known is None or (act is not None and (known.acts is None or not torch.equal(act, known.acts))):
            made = [layer.arranged() for layer in layers]
            if any(arranged is None for arranged in made):
                return None
            quantizers: list[float] = []
            for layer in layers:
                knee, low, high, bits, tail = (
                    (0.0, 0.0, 0.0, 0, 0) if layer.quantizer is None else layer.quantizer.settings()
                )
                quantizers += [bits, tail, knee, low, high, layer.range_length]
            arranged = [layer for layer in made if layer is not None]
            # Assigned as a whole: another thread may read it at any time.
            self._operands, known = (
                Operands(
                    arranged,
                    [layer.scale for layer in arranged],
                    [layer.table for layer in arranged],
                    act,
                    quantizers,
                    [layer.in_features for layer in layers],
                    [layer.length for layer in layers],
                ),
            ) * 2
            # The bits were read from the checkpoint's file again.
            memory.trim()
        if norms is None:
            return None
        return (
            norms,
            [layer.words for layer in known.arranged],
            [layer.params for layer in known.arranged],
            known.scales,
            known.tables,
            self._structure.biases(),
            known.quantizers,
            known.columns,
            known.lengths,
        )

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
        wanted = (getattr(config, "output_hidden_states", None), getattr(config, "output_attentions", None))
        if use_cache is False or any(value is not None and value is not False for value in wanted):
            return None
        if any(value is not None and value is not False for name, value in others.items() if name not in _UNREAD):
            return None
        layers = getattr(past_key_values, "layers", [])
        blocks = self.decoder.layers
        if len(layers) != len(blocks) or not self._is_untouched():
            return None
        for layer in layers:
            if not isinstance(layer, PackedKVLayer) or layer.length == 0 or layer.groups != layers[0].groups:
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

    def _is_untouched(self) -> bool:
        """Whether the blocks are as they were loaded, with nothing in them that a token of the operator would skip."""
        if self._structure is None:
            self._structure = Structure.of(self.decoder) or False
        return self._structure is not False and self._structure.holds(self.decoder.config)
