"""Stage 2, weight-aware training: one binarized block learns to give the full-precision block's output.

Activations stay in full precision. The block's input is what the earlier, already binarized blocks deliver, its
target the teacher block's output on the teacher's own stream, so later blocks absorb earlier error (LBLLM; the same
chain as EfficientQAT's Block-AP). Latent weights start from stage 1's compensated values; trained jointly with them
are the group parameters and, in the relaxed form, the bitmap G_fp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lbllm.models.blocks import BlockCall
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import WatConfig
from lbllm.stages.distill import Step, binary_layers, distill


def thaw_layers(layers: dict[str, BinaryLinear], latents: dict[str, Tensor], config: WatConfig) -> list[dict[str, Any]]:
    """Begin training a block's frozen layers from latent weights (out, in) by layer name; the optimizer's groups."""
    groups: list[dict[str, Any]] = []
    for name, layer in layers.items():
        latent = latents[name]
        relaxed = config.bitmap == "relaxed" and layer.fmt.format == "w1+1"
        layer.thaw(latent, "relaxed" if relaxed else "coupled")
        scale = float(latent.std())
        groups.append({"params": [layer.latent], "lr": config.lr_weight * scale})
        groups.append({"params": [layer.params], "lr": config.lr_levels * scale})
        if layer.bitmap is not None:
            groups.append({"params": [layer.bitmap], "lr": config.lr_bitmap})
    return groups


def wat_block(
    block: nn.Module,
    call: BlockCall,
    inputs: Tensor,
    targets: Tensor,
    latents: dict[str, Tensor],
    config: WatConfig,
    *,
    seed: int,
    autocast: Any,
) -> Iterator[Step]:
    """Stage 2 on a block of frozen ``BinaryLinear`` layers; ``latents`` are stage 1's weights (out, in) by layer name.

    The layers are frozen again, with the new bits and levels, when the iterator ends.
    """
    layers = binary_layers(block)
    groups = thaw_layers(layers, latents, config)
    yield from distill(
        block,
        call,
        inputs,
        targets,
        groups,
        config,
        loss_kind=config.loss,
        seed=seed,
        autocast=autocast,
    )
    for layer in layers.values():
        layer.freeze()
