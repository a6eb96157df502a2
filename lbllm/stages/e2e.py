"""Stage 4, end to end: the whole student learns the teacher's logits. It is optional and not part of LBLLM.

The stage trains the group parameters (alpha, mu), the scales of embeddings that have 4 bits, and after stage 3
knees and clips, with activations and KV cache as they will be deployed. (EfficientQAT's second phase, Chen et al. 2024,
trains step sizes like this.) Bits are fixed unless latent weights are given: then each weight takes the level nearest
to its latent weight, as in stage 2.

The model processes one sequence at a time and sums the gradients. Each step computes the fake-quantized weight of every
layer once, in the precision of the matrix products. This weight collects its gradient, which is then passed on to the
layer's parameters: so no autograd graph from parameters to weights spans the model.

At the end the parameters can be blended with their starting values (WiSE-FT, Wortsman et al. 2022): this keeps most of
what the new text taught, and the model forgets less of its other abilities.
"""

from __future__ import annotations

import inspect
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm import ranks
from lbllm.models.blocks import share_copy
from lbllm.quant.model_cache import keeps_attention_alone, passing_cache
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import E2eConfig
from lbllm.stages.attention import attend_by_products
from lbllm.stages.distill import Step, batch_order, cosine, product_dtype, quantizers_of
from lbllm.stages.losses import LOSSES, feature_error, gram_error
from lbllm.stages.trained_table import TrainedTable

WARM_UP = 5  # steps over which the learning rate rises: Adam first has to estimate the size of the gradients


class EndToEnd:
    """Trains the ``layers`` of a student: frozen BinaryLinears; layers that read the same input share a quantizer.

    ``latents``: empty, or one latent weight (out, in) per layer, trained with ``config.lr_weight``; ``freeze`` fixes
    the bits at the end. ``tables``: embeddings and output head whose scales train. The models' other linear layers are
    stored in autocast's precision. ``state`` and ``load`` continue an interrupted training between two steps, bit for
    bit.
    """

    def __init__(
        self,
        student: PreTrainedModel,
        teacher: PreTrainedModel,
        layers: Sequence[BinaryLinear],
        sequences: Tensor,
        config: E2eConfig,
        *,
        latents: Sequence[Tensor] = (),
        tables: Sequence[TrainedTable] = (),
        seed: int,
        autocast: Any,
    ) -> None:
        self.layers, self.sequences, self.config, self.autocast = layers, sequences, config, autocast
        self.tables = tables
        self.student, self.teacher = student, share_copy(teacher)
        takes_cache = "past_key_values" in inspect.signature(student.forward).parameters
        self.takes_cache = takes_cache and keeps_attention_alone(student.config)
        self.dtype = product_dtype(autocast, layers[0].params)
        if self.dtype != layers[0].params.dtype:
            _cast_linear((self.student, self.teacher), self.dtype)
            if sequences.device.type == "cpu":
                for model in (self.student, self.teacher):
                    attend_by_products(model)
        self.order = batch_order(len(sequences), max(1, config.batch_tokens // sequences.shape[1]), config.epochs, seed)
        self.step = 0
        self.quantizers = quantizers_of(layers)
        student.requires_grad_(False)
        groups: list[dict[str, Any]] = []
        for number, layer in enumerate(layers):
            scale = float(layer.weight().detach().std())
            for parameter in layer.of_levels():
                parameter.requires_grad_()
            groups += layer.level_groups(config.lr_levels * scale)
            if latents:
                layer.thaw(layer.nearest_to(latents[number]), "coupled")
                groups.append({"params": [layer.latent], "lr": config.lr_weight * scale * layer.latent_rate})
        if self.quantizers:
            acts = [quantizer.act.requires_grad_() for quantizer in self.quantizers]
            groups.append({"params": acts, "lr": config.lr_act})
        groups += [{"params": [table.factors], "lr": config.lr_embeddings} for table in tables]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.start_values = [parameter.detach().clone() for parameter in self.parameters] if config.start_share else []
        self.rates = [group["lr"] for group in groups]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.95), eps=1e-10, fused=True)

    @torch.no_grad()
    def loss(self, sequences: Tensor) -> float:
        """Return the present student's mean loss over sequences of token ids (n, T)."""
        self._expand()
        losses = [self._next_token_loss(one) for one in sequences.split(1)]
        self._drop()
        return float(torch.stack(losses).mean())

    def steps(self) -> Iterator[Step | None]:
        """Yield the remaining steps, then blend the parameters with their starting values.

        Before each sequence it yields None, so that the caller can stop there; on several ranks, which share the
        sequences of a step, before each round of them. A step whose loss is not finite is not applied, and it is the
        last step.
        """
        while self.step < len(self.order):
            rows, began = self.order[self.step], time.perf_counter()
            factor = cosine(self.step, len(self.order)) * min(1.0, (self.step + 1) / WARM_UP)
            for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
                group["lr"] = rate * factor
            self.optimizer.zero_grad(set_to_none=True)
            self._expand()
            losses: list[Tensor] = []
            for round_ in rows.split(ranks.count()):
                yield None
                for row in round_[ranks.rank() : ranks.rank() + 1].tolist():
                    loss = self._next_token_loss(self.sequences[row : row + 1]) / len(rows)
                    loss.backward()
                    losses.append(loss.detach())
            own = sum(torch.stack(losses).tolist()) if losses else 0.0  # the step's one copy to the host
            total = ranks.mean(own, 1) * ranks.count()
            if math.isfinite(total):
                for layer in self.layers:
                    assert layer.dense is not None
                    if layer.dense.grad is not None:  # else this rank had no sequence
                        layer.weight().backward(layer.dense.grad.to(layer.params.dtype))
                for table in self.tables:
                    table.collect()
                ranks.sum_(*ranks.gradients(self.parameters))
                self.update()
            self._drop()
            self.step += 1
            speed = rows.numel() * self.sequences.shape[1] / (time.perf_counter() - began)
            yield Step(self.step, total, 0.0, factor, speed)
            if not math.isfinite(total):
                break
        if self.start_values:
            with torch.no_grad():
                for parameter, start in zip(self.parameters, self.start_values, strict=True):
                    parameter.lerp_(start, self.config.start_share)

    def update(self) -> None:
        """Clip the gradients of the step, then step and bound all parameters."""
        torch.nn.utils.clip_grad_norm_(self.parameters, self.config.grad_clip)
        self.optimizer.step()
        for quantizer in self.quantizers:
            quantizer.bound()
        for table in self.tables:
            table.bound()

    def freeze(self) -> None:
        """End the training: fix the bits and round the group parameters to the values that a checkpoint stores."""
        for layer in self.layers:
            layer.freeze()
            layer.round_params()
        for table in self.tables:
            table.freeze()

    def state(self) -> dict[str, Tensor]:
        """Return all tensors that another process needs to continue after the last complete step."""
        tensors = {"step": torch.tensor(self.step)}
        for index, parameter in enumerate(self.parameters):
            tensors[f"{index}.value"] = parameter.detach()
            tensors |= {f"{index}.{name}": value for name, value in self.optimizer.state[parameter].items()}
        return tensors

    @torch.no_grad()
    def load(self, tensors: dict[str, Tensor]) -> None:
        """Continue from the result of ``state``."""
        self.step = int(tensors["step"])
        for index, parameter in enumerate(self.parameters):
            found = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{index}.")}
            parameter.copy_(found.pop("value"))
            self.optimizer.state[parameter] = {
                name: value.to(parameter.device, copy=True) for name, value in found.items()
            }

    def _next_token_loss(self, sequence: Tensor) -> Tensor:
        """Return the loss of one sequence of token ids (1, T), averaged over its T - 1 predictions."""
        ids = sequence[:, :-1]
        features = self.config.feature_weight > 0 or self.config.gram_weight > 0
        options: dict[str, Any] = {"use_cache": False, "output_hidden_states": features}
        caches = [{"past_key_values": passing_cache()} if self.takes_cache else {} for _ in range(2)]
        with self.autocast():
            with torch.no_grad():
                teacher = self.teacher(input_ids=ids, **options, **caches[0])
            student = self.student(input_ids=ids, **options, **caches[1])
        return self.compare(student, teacher, sequence[0, 1:])

    def compare(self, student: Any, teacher: Any, tokens: Tensor) -> Tensor:
        """Return the loss of both models' outputs for a sequence whose next tokens are ``tokens`` (T - 1,)."""
        loss = LOSSES[self.config.loss](student.logits[0], teacher.logits[0], tokens)
        # The first hidden states are the embeddings.
        if self.config.feature_weight > 0:
            error = feature_error(student.hidden_states[1:], teacher.hidden_states[1:])
            loss = loss + self.config.feature_weight * error
        if self.config.gram_weight > 0:
            loss = loss + self.config.gram_weight * gram_error(student.hidden_states[1:], teacher.hidden_states[1:])
        return loss

    def _expand(self) -> None:
        for layer in self.layers:
            layer.dense = layer.weight().detach().to(self.dtype).requires_grad_()
        for table in self.tables:
            table.expand()

    def _drop(self) -> None:
        for layer in self.layers:
            layer.dense = None


def _cast_linear(models: Sequence[nn.Module], dtype: torch.dtype) -> None:
    """Store the weights of all dense linear layers in ``dtype``, so that autocast doesn't convert them for each
    sequence. Models that share a weight still share it."""
    cast: dict[Tensor, nn.Parameter] = {}
    for model in models:
        for module in model.modules():
            if type(module) is nn.Linear and module.weight.dtype != dtype:
                weight = module.weight
                if weight not in cast:
                    cast[weight] = nn.Parameter(weight.detach().to(dtype), requires_grad=False)
                module.weight = cast[weight]
