"""Stage 4, end to end (optional; LBLLM has none): the whole student learns to give the teacher's logits.

Trained are the group parameters (alpha, mu) and, after stage 3, knees and clips, with activations and KV cache as they
will be deployed. (EfficientQAT's second phase, Chen et al. 2024, trains step sizes like this.) Bits are fixed unless
latent weights are given: then each weight takes the level nearest to its latent one, as in stage 2.

Sequences go through one at a time and their gradients are summed. Each layer's fake-quantized weight is made once a
step, in the precision that matrices are multiplied in, and collects its gradient, which then goes to what makes the
weight: that graph never spans the model.

In the end parameters can be drawn back towards those it began with (WiSE-FT, Wortsman et al. 2022): what the new text
taught stays for the most part, and less of what it did not ask for is lost.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.models.blocks import share_copy
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import E2eConfig
from lbllm.stages.attention import attend_by_products
from lbllm.stages.distill import Step, batch_order, cosine, quantizers_of
from lbllm.stages.losses import LOSSES, feature_error

WARM_UP = 5  # steps over which the learning rate rises: Adam knows nothing yet of the gradients' sizes


class EndToEnd:
    """The training of a student's ``layers``, frozen BinaryLinears of which those that read one input share their
    quantizer. ``latents`` (out, in), one a layer or none, train with ``config.lr_weight``; ``freeze`` then fixes the
    bits. The student's other linear layers are then held in autocast's precision. ``state`` and ``load`` carry the
    training over an interruption between two steps, bit for bit."""

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: Sequence[BinaryLinear],
        sequences: Tensor,
        config: E2eConfig,
        *,
        latents: Sequence[Tensor] = (),
        seed: int,
        autocast: Any,
    ) -> None:
        self.layers, self.sequences, self.config, self.autocast = layers, sequences, config, autocast
        self.student, self.teacher, place = student, share_copy(teacher), sequences.device.type
        with autocast():
            self.dtype = torch.get_autocast_dtype(place) if torch.is_autocast_enabled(place) else None
        if self.dtype is not None:
            _cast_linear((self.student, self.teacher), self.dtype)
            if place == "cpu":
                for model in (self.student, self.teacher):
                    attend_by_products(model)
        self.order = batch_order(len(sequences), max(1, config.batch_tokens // sequences.shape[1]), config.epochs, seed)
        self.step = 0
        self.quantizers = quantizers_of(layers)
        student.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for number, layer in enumerate(layers):
            scale = float(layer.weight().detach().std())
            groups.append({"params": [layer.params.requires_grad_()], "lr": config.lr_levels * scale})
            if latents:
                layer.thaw(layer.nearest_to(latents[number]), "coupled")
                groups.append({"params": [layer.latent], "lr": config.lr_weight * scale})
        if self.quantizers:
            acts = [quantizer.act.requires_grad_() for quantizer in self.quantizers]
            groups.append({"params": acts, "lr": config.lr_act})
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.begun = [parameter.detach().clone() for parameter in self.parameters] if config.start_share else []
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10, fused=True)

    @torch.no_grad()
    def loss(self, sequences: Tensor) -> float:
        """The mean loss over sequences (n, T) as the student is now."""
        self._expand()
        losses = [self._next_token_loss(one) for one in sequences.split(1)]
        self._drop()
        return float(torch.stack(losses).mean())

    def steps(self) -> Iterator[Step | None]:
        """The steps that are left, and the drawing back; between two sequences None, where the caller may leave off. A
        step whose loss is not finite is not applied, and the last."""
        while self.step < len(self.order):
            rows, began = self.order[self.step], time.perf_counter()
            factor = cosine(self.step, len(self.order)) * min(1.0, (self.step + 1) / WARM_UP)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad(set_to_none=True)
            self._expand()
            total = 0.0
            for row in rows:
                yield None
                loss = self._next_token_loss(self.sequences[row : row + 1]) / len(rows)
                loss.backward()
                total += float(loss.detach())
            if math.isfinite(total):
                for layer in self.layers:
                    assert layer.dense is not None
                    assert layer.dense.grad is not None
                    layer.weight().backward(layer.dense.grad.to(layer.params.dtype))
                torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
                self.optimizer.step()
                for quantizer in self.quantizers:
                    quantizer.bound()
            self._drop()
            self.step += 1
            speed = rows.numel() * self.sequences.shape[1] / (time.perf_counter() - began)
            yield Step(self.step, total, 0.0, factor, speed)
            if not math.isfinite(total):
                break
        if self.begun:
            with torch.no_grad():
                for parameter, begun in zip(self.parameters, self.begun, strict=True):
                    parameter.lerp_(begun, self.config.start_share)

    def freeze(self) -> None:
        """Fix bits and round group parameters to what a checkpoint stores: the end of the training."""
        for layer in self.layers:
            layer.freeze()
            layer.round_params()

    def state(self) -> dict[str, Tensor]:
        """All that a later process needs to go on from after the last whole step."""
        tensors = {"step": torch.tensor(self.step)}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.value"] = parameter.detach()
            tensors |= {f"{index}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Go on from another process's ``state``."""
        self.step = int(tensors["step"])
        for index, parameter in enumerate(self.parameters):
            found = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{index}.")}
            parameter.copy_(found.pop("value"))
            self.optimizer.state[parameter] = {
                name: value.to(parameter.device, copy=True) for name, value in found.items()
            }

    def _next_token_loss(self, sequence: Tensor) -> Tensor:
        """The loss of one sequence of token ids (1, T) over the T - 1 next tokens that it has."""
        features, read = self.config.feature_weight > 0, sequence[:, :-1]
        with self.autocast():
            with torch.no_grad():
                meant = self.teacher(input_ids=read, use_cache=False, output_hidden_states=features)
            given = self.student(input_ids=read, use_cache=False, output_hidden_states=features)
        loss = LOSSES[self.config.loss](given.logits[0], meant.logits[0], sequence[0, 1:])
        if features:  # the first hidden states are the embeddings
            loss = loss + self.config.feature_weight * feature_error(given.hidden_states[1:], meant.hidden_states[1:])
        return loss

    def _expand(self) -> None:
        for layer in self.layers:
            layer.dense = layer.weight().detach().to(self.dtype or layer.params.dtype).requires_grad_()

    def _drop(self) -> None:
        for layer in self.layers:
            layer.dense = None


def _cast_linear(models: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Hold the weights of all ordinary linear layers in ``dtype``, so that autocast doesn't convert them for every
    sequence; a weight that several models share stays one."""
    cast: dict[Tensor, nn.Parameter] = {}
    for model in models:
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype != dtype:
                weight = module.weight
                if weight not in cast:
                    cast[weight] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                module.weight = cast[weight]
