"""Causal attention for training on a CPU: matrix products over whole groups of heads.

For a few hundred tokens in bfloat16, PyTorch's own operator with its gradients takes about 1.5 times as long: it is
designed for long sequences, whose scores do not fit into memory. Here the scores of one layer and sequence stay in
memory, and heads that share keys and values are computed in one product.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

NAME = "lbllm_products"


class _CausalAttention(torch.autograd.Function):
    """softmax(scaling Q K^T) V with a causal mask; queries (b, h, T, d), keys and values (b, h / r, T, d)."""

    @staticmethod
    @torch.amp.custom_fwd(device_type="cpu", cast_inputs=torch.bfloat16)  # autocast's dtype on CPUs
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        groups, tokens = key.shape[0] * key.shape[1], key.shape[2]
        scaled = (query * scaling).reshape(groups, -1, query.shape[-1])
        keys, values = key.flatten(0, 1), value.flatten(0, 1)
        scores = torch.bmm(scaled, keys.transpose(1, 2))
        later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
        scores.view(groups, -1, tokens, tokens).masked_fill_(later, -torch.inf)
        shares = scores.softmax(-1, dtype=scores.dtype)
        ctx.save_for_backward(scaled, keys, values, shares)
        ctx.scaling, ctx.shapes = scaling, (query.shape, key.shape)
        return torch.bmm(shares, values).view(*query.shape[:-1], -1)

    @staticmethod
    @torch.amp.custom_bwd(device_type="cpu")
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        scaled, keys, values, shares = ctx.saved_tensors
        grad = grads[0].reshape(*scaled.shape[:-1], -1)
        by_value = torch.bmm(shares.transpose(1, 2), grad)
        by_share = torch.bmm(grad, values.transpose(1, 2))
        by_score = torch._softmax_backward_data(by_share, shares, -1, shares.dtype)
        by_query = torch.bmm(by_score, keys) * ctx.scaling
        by_key = torch.bmm(by_score.transpose(1, 2), scaled)
        query_shape, key_shape = ctx.shapes
        return by_query.view(query_shape), by_key.view(key_shape), by_value.view(*key_shape[:-1], -1), None


def causal_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute attention as an attention function of transformers: returns (b, T, h, d) and None.

    The matrix products above serve whole texts without padding, windows or biases; other calls use transformers' own
    function.
    """
    causal = others.get("is_causal") in (None, True) and getattr(module, "is_causal", True)
    whole = attention_mask is None and others.get("position_bias") is None and query.shape[2] == key.shape[2]
    if not (causal and whole and dropout == 0 and scaling is not None):
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    output: Tensor = _CausalAttention.apply(query, key, value, scaling)
    return output.transpose(1, 2).contiguous(), None


def attend_by_products(model: PreTrainedModel) -> None:
    """Make a model use ``causal_attention`` instead of PyTorch's attention operator."""
    AttentionInterface.register(NAME, causal_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if getattr(config, "_attn_implementation", None) == "sdpa":
            config._attn_implementation = NAME
