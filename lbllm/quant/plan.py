"""Decide which layers of a model are binarized and in which format, and count the stored bits."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from lbllm.config import setting_name
from lbllm.errors import ConfigError
from lbllm.labels import CODE_BITS
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.quant.levels import PARAMS, group_length
from lbllm.quant.table import TABLE, has_table
from lbllm.sections import LayerFormat, QuantConfig


def layer_bits(fmt: LayerFormat, out_features: int, in_features: int) -> int:
    """Return the stored bits of one packed layer: bit planes (whole bytes per row), group parameters (whole bytes per
    row) and their scales, and a table of levels, without the bias."""
    count = PARAMS[fmt.format]
    groups = -(-in_features // group_length(fmt.group_size, in_features))
    planes = out_features * -(-in_features // 8) * 8 * CODE_BITS[fmt.format]
    scales = {4: out_features + count * 2, 8: out_features * count * 2, 16: 0}[fmt.param_bits] * 16
    table = TABLE * 16 if has_table(fmt.format) else 0
    return planes + out_features * -(-groups * count * fmt.param_bits // 8) * 8 + scales + table


def block_formats(
    model: PreTrainedModel, quant: QuantConfig
) -> tuple[str, nn.ModuleList, list[dict[str, LayerFormat]]]:
    """Return the path of the decoder blocks, the blocks, and for each block the formats of its layers to binarize.

    A row that is shorter than a group is one group. Raises ConfigError if that is so for most of the weights with this
    group size, if the settings leave no layer to binarize, if a pattern matches no layer, or if the model has a cache
    of its own, which can't keep few bits.
    """
    _check_cache(model, quant.kv_bits)
    path, blocks = decoder_blocks(model)
    formats: list[dict[str, LayerFormat]] = []
    names: list[str] = []
    layers_of: dict[int, list[tuple[str, Tensor]]] = {}  # by group size
    for number, block in enumerate(blocks):
        formats.append({})
        for name, layer in linear_layers(block).items():
            full = f"{path}.{number}.{name}"
            names.append(full)
            fmt = quant.layer(full)
            if fmt is None:
                continue
            layers_of.setdefault(fmt.group_size, []).append((full, linear_weight(layer)))
            formats[-1][name] = fmt
    for size, layers in layers_of.items():
        short = [(full, weight) for full, weight in layers if weight.shape[1] < size]
        if 2 * sum(weight.numel() for _, weight in short) > sum(weight.numel() for _, weight in layers):
            full, weight = short[0]
            raise ConfigError(
                f"{setting_name('quant.group_size')} {size} is longer than a row of {full}, which has "
                f"{weight.shape[1]} weights; choose at most {weight.shape[1]}, or -1 for one group per row"
            )
    for pattern in (*quant.skip, *quant.overrides):
        probe = QuantConfig(skip=(pattern,))
        if all(probe.layer(name) is not None for name in names):
            raise ConfigError(f"pattern {pattern!r} matches no layer; names look like {names[0]!r}")
    if not any(formats):
        raise ConfigError(f"{setting_name('quant.skip')} {list(quant.skip)} leaves no layer to binarize")
    return path, blocks, formats


def _check_cache(model: PreTrainedModel, bits: int) -> None:
    """Raise ConfigError for fewer than 16 bits, if the model takes only a cache of a class of its own."""
    here = type(model).__module__
    own = [
        name
        for name, kind in vars(sys.modules[here]).items()
        if isinstance(kind, type) and issubclass(kind, Cache) and kind.__module__ == here
    ]
    if own and bits < 16:
        raise ConfigError(
            f"{type(model).__name__} keeps keys and values in a cache of its own, {own[0]}, which can't have {bits} "
            f"bits; set {setting_name('quant.kv_bits')} to 16"
        )


def bits_per_weight(blocks: Iterable[nn.Module], formats: list[dict[str, LayerFormat]]) -> float:
    """Return the stored bits of all binarized layers, with group parameters, divided by the number of their weights."""
    bits = weights = 0
    for block, layers in zip(blocks, formats, strict=True):
        for name, fmt in layers.items():
            out_features, in_features = linear_weight(block.get_submodule(name)).shape
            bits += layer_bits(fmt, out_features, in_features)
            weights += out_features * in_features
    return bits / weights
