"""Stage 2, weight-aware training: each binarized block learns the output of the full-precision block.

Activations stay in full precision. The block's input comes from the earlier, already binarized blocks. Its target is
the output of the teacher's block in the full-precision teacher. So later blocks correct earlier errors (LBLLM;
EfficientQAT's Block-AP does the same). The stage trains latent weights, which start from stage 1's compensated values,
jointly with the group parameters and, in the relaxed form, the bitmap G_fp.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from lbllm.models.calls import BlockCall
from lbllm.quant.training_layer import BinaryLinear
from lbllm.ranks import Share
from lbllm.sections import WatConfig
from lbllm.stages.distill import HeldOut, Step, binary_layers, distill


def thaw_layers(layers: dict[str, BinaryLinear], latents: dict[str, Tensor], config: WatConfig) -> list[dict[str, Any]]:
    """Prepare a block's frozen layers for training from ``latents`` (out, in), by layer name; return the optimizer's
    parameter groups."""
    groups: list[dict[str, Any]] = []
    for name, layer in layers.items():
        relaxed = config.bitmap == "relaxed" and layer.fmt.format == "w1+1"
        layer.thaw(latents[name], "relaxed" if relaxed else "coupled")
        assert layer.latent is not None
        scale = float(layer.latent.detach().std())
        groups.append({"params": [layer.latent], "lr": config.lr_weight * scale * layer.latent_rate})
        groups += layer.level_groups(config.lr_levels * scale)
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
    held_out: HeldOut | None = None,
    share: Share | None = None,
    teacher_inputs: Tensor | None = None,
) -> Iterator[Step]:
    """Run stage 2 on a block of frozen ``BinaryLinear`` layers; yields each training step.

    ``inputs`` and ``targets`` are (n, T, hidden), and so are ``teacher_inputs``, a second stream to train on as in
    ``distill`` (Lillama, Sy et al. 2024). ``latents`` are stage 1's weights (out, in) by layer name, of any float type.
    When the iterator ends, the layers are frozen again, with the new bits and levels.
    """
    layers = binary_layers(block)
    groups = thaw_layers(layers, latents, config)
    del latents  # the layers hold their own
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
        held_out=held_out,
        share=share,
        teacher_inputs=teacher_inputs,
    )
    for layer in layers.values():
        layer.freeze()
