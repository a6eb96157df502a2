"""Measure what plans need of a teacher, and store it: a study. What is stored already is not measured again.

    bench = Bench.open(config)
    study = bench.study()                     minutes on the embedded model, or at once
    study = bench.checked(study, formats)     one more model, for example a plan

Steps: the layers alone (``alone``), their shares in the divergence (``shares``), and whole models in one format each.
All is measured on training text, the layers and models on other sequences of it than those that stage 1 sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.checkpoints.find import open_teacher
from lbllm.config import RunConfig, setting_name
from lbllm.errors import ConfigError, CorpusError, ModelError, ResourceError
from lbllm.machine import device_named, free_memory, make_accelerator
from lbllm.measure.needs import planned_layers
from lbllm.measure.perplexity import token_losses, windows_at_once
from lbllm.models.blocks import context_length, decoder_blocks, linear_layers, linear_weight
from lbllm.models.experts import experts_of
from lbllm.models.teacher import Teacher, load_tokenizer, skeleton
from lbllm.planning.alone import alone
from lbllm.planning.candidates import ANCHORS, REFERENCE, candidates, format_words
from lbllm.planning.shares import shares
from lbllm.planning.stage_one import binarized
from lbllm.planning.store import load_study, save_study, teacher_hash
from lbllm.planning.study import Layer, Study
from lbllm.quant.plan import block_formats
from lbllm.sections import LayerFormat, PtqConfig
from lbllm.texts.corpus import load_corpus, sequences_hash
from lbllm.units import size

SEQ_LEN, TOKENS, JUDGED = 256, 4_096, 2_048  # tokens: of a sequence, for stage 1, to measure on
SPREAD = 16  # of so many sequences one is taken: neighbours are often of one document, which is easier than others
PTQ = PtqConfig(tokens=TOKENS, sweeps=0)
# What a measurement says of itself: the share that is done, 0 to 1, and what it does. May raise an exception to end it.
Report = Callable[[float, str], None]


def spread(sequences: Tensor, count: int) -> Tensor:
    """At most ``count`` of some sequences (n, T), evenly from first to last."""
    count = min(count, len(sequences))
    return sequences[torch.arange(count) * len(sequences) // count]


class Judge:
    """Measures models on windows of token ids (n, T). The teacher's logits are computed once and kept: 4 bytes for each
    token and entry of the vocabulary."""

    def __init__(self, teacher: Teacher, windows: Tensor) -> None:
        self.teacher, self.batches = teacher, windows.split(windows_at_once(windows))
        self._logits: list[Tensor] = []

    def kl(self, model: PreTrainedModel) -> float:
        """The mean KL(teacher || model), in nats per token."""
        if not self._logits:
            self._logits = [token_losses(self.teacher.model, batch)[1] for batch in self.batches]
        found = []
        for batch, logits in zip(self.batches, self._logits, strict=True):
            losses = token_losses(model, batch, logits)[0].kl
            assert losses is not None
            found.append(losses.flatten())
        return float(torch.cat(found).mean(dtype=torch.float64))


@dataclass
class Bench:
    """A teacher by name, and what its plans are measured on: token ids (n, T) for stage 1 and other ones to measure on.
    ``teacher`` is loaded when something is measured; ``quant``: which layers are binarized."""

    config: RunConfig
    calibration: Tensor
    judged: Tensor
    facts: dict[str, Any]
    report: Report = field(default=lambda share, what: None)

    @classmethod
    def open(cls, config: RunConfig, report: Report = lambda share, what: None) -> Bench:
        """Read the text. Raises ModelError, CorpusError, ConfigError."""
        if config.start is not None:
            raise ConfigError("a plan is for a run from a teacher; a run from a checkpoint has the checkpoint's format")
        report(0.0, "Reading the text")
        tokenizer: PreTrainedTokenizerBase = load_tokenizer(config.model)
        model = skeleton(config.model)
        if any(experts_of(block) is not None for block in decoder_blocks(model)[1]):
            raise ModelError(
                f"{config.model} is a mixture of experts, and plans for one are not built; choose formats by hand, "
                f"for example other ones for the experts by {setting_name('quant.overrides')}"
            )
        path, _, formats = block_formats(model, config.quant)
        length = min(SEQ_LEN, context_length(model) or SEQ_LEN)
        text = spread(
            load_corpus(config.corpus, tokenizer, seq_len=length, tokens=SPREAD * (TOKENS + JUDGED)).sequences,
            -(-(TOKENS + JUDGED) // length),
        )
        if len(text) < 2:
            raise CorpusError(
                f"text {config.corpus} is too short for a plan, which measures on two sequences of {length}"
            )
        cut = min(len(text) - 1, max(1, round(len(text) * TOKENS / (TOKENS + JUDGED))))
        facts = {
            "teacher": teacher_hash(config.model),
            "text": sequences_hash(text),
            "calibration": cut,
            "ptq": PTQ.model_dump(mode="json"),
            "formats": [
                fmt.model_dump(mode="json") for fmt in candidates(fmt for block in formats for fmt in block.values())
            ],
            "layers": [f"{path}.{number}.{name}" for number, block in enumerate(formats) for name in block],
        }
        return cls(config, text[:cut], text[cut:], facts, report)

    @cached_property
    def teacher(self) -> Teacher:
        """The teacher in memory. Raises ModelError, ResourceError."""
        model = skeleton(self.config.model)
        # Itself, the binarized layers in float32, and beside them in bfloat16 or their activations.
        needed = 4 * model.num_parameters() + 12 * sum(
            linear_weight(layer).numel()
            for block in decoder_blocks(model)[1]
            for layer in linear_layers(block).values()
        )
        if needed > (free := free_memory(self.config.device)):
            raise ResourceError(
                f"a plan needs about {size(needed)} of memory for {self.config.model} and its binarized copies, and "
                f"{size(free)} are free; free some, or plan on a smaller model of the same family"
            )
        self.report(0.0, "Loading the teacher")
        return open_teacher(self.config.model, device=device_named(self.config.device))

    @cached_property
    def judge(self) -> Judge:
        """What measures on the study's own text."""
        return Judge(self.teacher, self.judged)

    @cached_property
    def _autocast(self) -> Any:
        return make_accelerator(self.config.device).autocast

    def blank(self, model: PreTrainedModel) -> Study:
        """Return a study without measurements, in which all formats are equal. ``model``: the teacher or its
        skeleton."""
        formats = self._formats
        layers = tuple(
            Layer(name=layer.name, rows=layer.rows, columns=layer.columns, share=1.0, errors=(1.0,) * len(formats))
            for layer in planned_layers(model, self.config.quant)
        )
        return Study(facts=self.facts, formats=formats, layers=layers).with_measured([0], 1.0)

    @property
    def _formats(self) -> tuple[LayerFormat, ...]:
        return tuple(map(LayerFormat.model_validate, self.facts["formats"]))

    def study(self) -> Study:
        """Return the study; what of it is not stored is measured and stored. Raises LbllmError."""
        # Shares of the time: the layers, then each model.
        part = 1 / (1 + len(ANCHORS))
        found = self.layers(part)
        for number, fmt in enumerate(ANCHORS, 1):
            what = f"All layers in {format_words(fmt)}"
            found = self.checked(found, [found.number(fmt)], what, number * part, part)
        return found

    def layers(self, part: float = 1.0) -> Study:
        """Return the stored study as far as it has come, or measure the layers. ``part``: the share of what is
        reported."""
        found = load_study(self.facts)
        if found is None:
            found = self._layers(self._step(0.0, part))
            save_study(found)
        return found

    def checked(self, study: Study, formats: Sequence[int], what: str, begin: float = 0.0, part: float = 1.0) -> Study:
        """Return the study with one more measured model, and store it. ``formats``: for each layer the number of its
        format, or one for all; ``what``: the model's name in reports."""
        if study.known(formats) is not None:
            return study
        step = self._step(begin, part)
        model = self.model(study, formats, lambda share, where: step(0.9 * share, f"{what}: {where}"))
        step(0.9, f"{what}: measuring")
        study = study.with_measured(formats, self.judge.kl(model))
        save_study(study)
        return study

    def model(self, study: Study, formats: Sequence[int], report: Report) -> PreTrainedModel:
        """Return the teacher after stage 1 in a choice of formats, in float32."""
        chosen = {layer.name: study.formats[k] for layer, k in zip(study.layers, study.each(formats), strict=True)}
        return binarized(
            self.teacher,
            self._by_block(chosen),
            self.calibration,
            PTQ,
            self._autocast,
            lambda done, of: report(done / of, f"block {done + 1} of {of}"),
        )

    def _layers(self, step: Report) -> Study:
        reference = self._by_block(dict.fromkeys(self.facts["layers"], REFERENCE))
        formats = self._formats
        weights, errors = alone(
            self.teacher,
            reference,
            formats,
            self.calibration,
            PTQ,
            self._autocast,
            lambda done, of: step(0.6 * done / of, f"Each layer alone: block {done + 1} of {of}"),
        )
        found = shares(
            self.teacher,
            weights,
            self.judged,
            self._autocast,
            lambda done, of: step(0.6 + 0.4 * done / of, f"What each layer costs: pass {done + 1} of {of}"),
        )
        layers = tuple(
            Layer(name=name, rows=len(weight), columns=weight.shape[1], share=found[name], errors=tuple(errors[name]))
            for name, weight in weights.items()
        )
        return Study(facts=self.facts, formats=formats, layers=layers)

    def _by_block(self, formats: dict[str, LayerFormat]) -> list[dict[str, LayerFormat]]:
        path, blocks = decoder_blocks(self.teacher.model)
        found: list[dict[str, LayerFormat]] = [{} for _ in blocks]
        for name, fmt in formats.items():
            number, _, layer = name.removeprefix(f"{path}.").partition(".")
            found[int(number)][layer] = fmt
        return found

    def _step(self, begin: float, part: float) -> Report:
        return lambda share, what: self.report(begin + part * share, what)
