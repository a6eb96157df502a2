"""Choose a format for each layer from a study: the plan for a target, beside one format for all layers.

A plan is about the choice with the least sum of costs within the bits (``lbllm.measure.sensitivity.allocate``). Formats
for the whole model are among its candidates: it is never predicted to be worse than one of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

from transformers import PreTrainedModel

from lbllm.config import RunConfig, setting_name
from lbllm.errors import ConfigError
from lbllm.json_input import shown
from lbllm.labels import CODE_BITS
from lbllm.measure.estimate import Estimate, estimate
from lbllm.measure.needs import PACKED, PROGRAM
from lbllm.measure.sensitivity import Sensitivity, allocate
from lbllm.planning.candidates import format_words, weight_format
from lbllm.planning.study import Study
from lbllm.planning.target import Target
from lbllm.sections import WHOLE_ROW, LayerFormat, LayerOverride, QuantConfig
from lbllm.units import size

# What happens to layers whose format is set already: refuse the plan, leave them as they are, or choose for them too.
Overridden = Literal["refuse", "keep", "replace"]
WAYS: tuple[Overridden, ...] = ("refuse", "keep", "replace")
CURVE = 32  # points of the curve of plans
_ROUNDS = 6


class OverriddenError(ConfigError):
    """Layers have settings of their own, and nobody has said what a plan does with them."""


@dataclass(frozen=True)
class Choice:
    """Formats for all layers, as numbers in a study's formats. ``bits``: per weight; ``predicted``: KL in nats per
    token; ``measured``: the same where it was measured; ``uniform``: the one format of all layers, if there is one."""

    formats: tuple[int, ...]
    bits: float
    predicted: float
    measured: float | None = None
    uniform: LayerFormat | None = None

    @property
    def kl(self) -> float:
        """The measured divergence, else the predicted one."""
        return self.predicted if self.measured is None else self.measured


@dataclass(frozen=True)
class Plan:
    """``chosen``: the plan itself; ``first``: the choice layer by layer; ``rejected``: this one, if it was measured and
    is worse than one format for all. ``uniform``: the best format for all layers within the same bits, if one fits, of
    those that were measured if the choice was; ``rival``: the best one as far as is known, measured or predicted.
    ``curve``: what plans reach, for some bits; ``uniforms``: all formats for the whole model. ``kept``: layers that
    keep a format of their own. ``formats``: of each layer by full name. ``config``: the settings with the plan in them;
    ``size``: its checkpoint in bytes, ``memory``: what the model then takes to answer."""

    target: Target
    chosen: Choice
    first: Choice
    rejected: Choice | None
    uniform: Choice | None
    rival: Choice | None
    curve: tuple[Choice, ...]
    uniforms: tuple[Choice, ...]
    kept: tuple[str, ...]
    formats: dict[str, LayerFormat]
    config: RunConfig
    size: int
    memory: int


def make_plan(
    study: Study, config: RunConfig, model: PreTrainedModel, target: Target, overridden: Overridden = "refuse"
) -> Plan:
    """Choose formats for a target. ``model``: the teacher or its skeleton. Raises ConfigError for a target below what
    formats can reach, and for layers with settings of their own if they are to be refused."""
    kept = _kept(study, config.quant, overridden)
    # One bit a weight only where two don't fit: its errors are far beyond those that layers were measured with.
    allowed = _allowed(study, kept, two_bits=True)
    if _Budget(study, config, model, target, allowed).beyond():
        allowed = _allowed(study, kept, two_bits=False)
    budget = _Budget(study, config, model, target, allowed)
    chosen = first = budget.fit()
    uniforms = tuple(_uniforms(study, kept))
    fitting = [one for one in uniforms if budget.holds(one, chosen)]
    rival = min(fitting, key=lambda one: one.kl, default=None)
    known = [] if chosen.measured is None else [one for one in fitting if one.measured is not None]
    uniform = min(known, key=lambda one: one.kl, default=rival)
    rejected = None
    if uniform is not None and _better(uniform, chosen):
        rejected, chosen = (chosen if chosen.measured is not None else None), uniform
    planned, result = budget.settings(chosen)
    return Plan(
        target,
        chosen,
        first,
        rejected,
        uniform,
        rival,
        tuple(_curve(study, allowed)),
        uniforms,
        tuple(kept),
        budget.named(chosen),
        planned,
        result.disk_bytes,
        answering_bytes(result),
    )


def _better(uniform: Choice, chosen: Choice) -> bool:
    """Whether one format for all is better than a choice layer by layer: as measured if both were, else as
    predicted."""
    if uniform.measured is not None and chosen.measured is not None:
        return uniform.measured < chosen.measured
    return uniform.predicted < chosen.predicted


def answering_bytes(result: Estimate) -> int:
    """What a finished model takes of memory while it answers: the program, its file as it is laid out in memory, and
    the KV cache."""
    packed = sum(result.parts[part] for part in ("bits", "bitmap", "parameters"))
    cache = 0 if result.cache is None else result.cache.nbytes
    return round(PROGRAM + PACKED * packed + result.disk_bytes - packed + cache)


def with_formats(config: RunConfig, formats: Mapping[str, LayerFormat]) -> RunConfig:
    """The settings with these formats of the layers, by full name: that of most layers as the run's own, the others by
    ``quant.overrides``. What overrides say of activations stays."""
    quant, wanted = config.quant, {name: weight_format(fmt) for name, fmt in formats.items()}
    counted = list(wanted.values())
    usual = max(dict.fromkeys(counted), key=counted.count)
    own = {"format": usual.format, "group_size": usual.group_size, "param_bits": usual.param_bits}
    before = {name: quant.layer(name) for name in wanted}
    rules: dict[str, LayerOverride] = {}
    for pattern, rule in quant.overrides.items():
        if rule.act_bits is not None:
            rules[pattern] = LayerOverride(act_bits=rule.act_bits)
    made = quant.model_copy(update=own | {"overrides": rules})
    for name, fmt in wanted.items():
        now, was = made.layer(name), before[name]
        assert now is not None
        assert was is not None
        if weight_format(now) != fmt:
            rules.pop(name, None)
            acts = was.act_bits if any(rule.act_bits is not None for rule in quant.overrides.values()) else None
            rules[name] = LayerOverride(
                format=fmt.format, group_size=fmt.group_size, param_bits=fmt.param_bits, act_bits=acts
            )
    return config.model_copy(update={"quant": quant.model_copy(update=own | {"overrides": rules})})


def _kept(study: Study, quant: QuantConfig, overridden: Overridden) -> dict[str, int]:
    """The layers that keep a format of their own, with its number in the study."""
    plain = weight_format(LayerFormat.model_validate(quant.model_dump(include=set(LayerFormat.model_fields))))
    own: dict[str, LayerFormat] = {}
    for layer in study.layers:
        fmt = quant.layer(layer.name)
        if fmt is not None and weight_format(fmt) != plain:
            own[layer.name] = fmt
    if own and overridden == "refuse":
        name, fmt = next(iter(own.items()))
        others = f" and {len(own) - 1} more" if len(own) > 1 else ""
        raise OverriddenError(
            f"{name}{others}: the format is set already, to {format_words(fmt)}, by {setting_name('quant.overrides')}. "
            "Let the plan keep these layers as they are or choose for them too, or take them out of the settings"
        )
    return {name: study.number(fmt) for name, fmt in own.items()} if overridden == "keep" else {}


def _allowed(study: Study, kept: Mapping[str, int], *, two_bits: bool) -> list[Sensitivity]:
    """The layers with the options that a plan may choose: groups are no longer than a row. ``two_bits``: without W1."""
    found = []
    for layer, one in zip(study.layers, study.sensitivities, strict=True):
        if layer.name in kept:
            options: Iterable[int] = [kept[layer.name]]
        else:
            options = [
                k
                for k, fmt in enumerate(study.formats)
                if fmt.group_size <= layer.columns and not (two_bits and CODE_BITS[fmt.format] < 2)
            ]
        found.append(replace(one, options=tuple(one.options[k] for k in options)))
    return found


def _choice(study: Study, formats: Sequence[int], uniform: LayerFormat | None = None) -> Choice:
    known = study.known(formats)
    return Choice(tuple(formats), study.bits(formats), study.predict(study.cost(formats)), known, uniform)


def _allocated(study: Study, allowed: Sequence[Sensitivity], bits: float) -> Choice:
    chosen = allocate(allowed, bits)
    return _choice(study, [study.formats.index(chosen[layer.name].format) for layer in study.layers])


def _uniforms(study: Study, kept: Mapping[str, int]) -> Iterable[Choice]:
    """One format for all layers, except those that keep their own; from the fewest bits on."""
    shortest = min(layer.columns for layer in study.layers)
    found = [
        _choice(study, [kept.get(layer.name, k) for layer in study.layers], fmt)
        for k, fmt in enumerate(study.formats)
        if fmt.group_size == WHOLE_ROW or fmt.group_size <= shortest
    ]
    return sorted(found, key=lambda one: (one.bits, one.kl))


def _least(allowed: Sequence[Sensitivity]) -> float:
    return sum(min(o.bits for o in one.options) for one in allowed) / sum(one.weights for one in allowed)


def _curve(study: Study, allowed: Sequence[Sensitivity]) -> Iterable[Choice]:
    least = _least(allowed)
    most = sum(min(one.options, key=lambda o: o.rise).bits for one in allowed) / sum(one.weights for one in allowed)
    for number in range(CURVE):
        yield _allocated(study, allowed, least + (most - least) * number / (CURVE - 1) + 1e-9)


class _Budget:
    """What a target leaves for the bits of the layers."""

    def __init__(
        self,
        study: Study,
        config: RunConfig,
        model: PreTrainedModel,
        target: Target,
        allowed: Sequence[Sensitivity],
    ) -> None:
        self.study, self.config, self.model, self.target = study, config, model, target
        self.allowed = allowed
        self.weights = sum(one.weights for one in allowed)

    def named(self, choice: Choice) -> dict[str, LayerFormat]:
        """The formats of a choice by the layers' full names."""
        return {layer.name: self.study.formats[k] for layer, k in zip(self.study.layers, choice.formats, strict=True)}

    def settings(self, choice: Choice) -> tuple[RunConfig, Estimate]:
        """The settings with a choice in them, and what a run of them gives."""
        planned = with_formats(self.config, self.named(choice))
        return planned, estimate(planned, model=self.model, rate=1e12)

    def _taken(self, choice: Choice) -> float:
        """What a choice takes of what the target counts."""
        if self.target.kind == "bits":
            return choice.bits
        result = self.settings(choice)[1]
        return result.disk_bytes if self.target.kind == "file" else answering_bytes(result)

    @cached_property
    def _smallest(self) -> tuple[Choice, float]:
        """The choice with the fewest bits, and what it takes of what the target counts."""
        choice = _allocated(self.study, self.allowed, _least(self.allowed) + 1e-9)
        return choice, self._taken(choice)

    def beyond(self) -> bool:
        """Whether the target is below what these options reach."""
        return self._smallest[1] > self.target.amount + 1e-9

    def holds(self, choice: Choice, fitting: Choice) -> bool:
        """Whether a choice is within the target; ``fitting``: one that is."""
        return choice.bits <= fitting.bits or self._taken(choice) <= self.target.amount + 1e-9

    def fit(self) -> Choice:
        """The best choice within the target. Raises ConfigError where none is so small."""
        amount = self.target.amount
        best, taken = self._smallest
        if self.beyond():
            least = f"{taken:.3f} bits per weight" if self.target.kind == "bits" else size(taken)
            raise ConfigError(self._too_small(least))
        if self.target.kind == "bits":
            return _allocated(self.study, self.allowed, amount)
        each = (PACKED if self.target.kind == "memory" else 1) / 8 * self.weights  # bytes of one more bit
        bits = best.bits + (amount - taken) / each
        for _ in range(_ROUNDS):  # the header of the file and the bytes of rows depend a little on the formats
            found = _allocated(self.study, self.allowed, bits)
            over = self._taken(found) - amount
            if over <= 0:
                return found
            bits -= over / each
        return best

    def _too_small(self, least: str) -> str:
        other = {
            "bits": "",
            "file": f", or lower {setting_name('quant.embedding_bits')}, which is {self.config.quant.embedding_bits}",
            "memory": f", or lower {setting_name('quant.embedding_bits')} or {setting_name('quant.kv_bits')}",
        }[self.target.kind]
        return (
            f"target {shown(self.target.words)} is below what the formats can reach: the smallest takes {least}. "
            f"Give a larger target{other}"
        )
