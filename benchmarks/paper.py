"""Measure what each difference between the presets paper and standard changes, one at a time.

    python -m benchmarks.paper --blocks 4 --out docs/results/paper.json
    python -m benchmarks.paper --out docs/results/paper.json                  the whole model, with stage 4

Each variant is a run with the settings of ``paper``, of which one difference is switched to ``standard``; the first and
the last variant are the two presets whole. All of them learn from the same number of tokens of one text. With
``--blocks`` the model consists of its first blocks, so later blocks get what earlier ones have left, as in a run.
Printed is the relative output error of the last block after each stage (mean over tokens of ||teacher - student||^2
over the larger of the two squared norms) on the corpus' tune part, which nothing is trained on, and for the whole model
the perplexity there.

The runs stay in ``--work``: the same command goes on where it was stopped. A stage that two variants have in common,
after the same stages with the same settings, is computed once.
"""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import open_teacher
from lbllm.config import DEFAULT_MODEL, RunConfig, leaves, make_config
from lbllm.errors import ConfigError
from lbllm.files import new_folder, write_file
from lbllm.machine import make_accelerator
from lbllm.measure.perplexity import perplexity
from lbllm.models.blocks import decoder_blocks, share_copy
from lbllm.models.loading import quiet
from lbllm.models.streamed import weight_hashes
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.run import run
from lbllm.quant.plan import bits_per_weight, block_formats
from lbllm.sections import PAPER_STAGES, STAGES, Stage, stage_number
from lbllm.stages.block_store import BlockStore, fingerprint
from lbllm.texts.corpus import Corpus, load_corpus

PAPER, STANDARD, STAGE_4 = "preset paper", "preset standard", "stage 4"
# Every difference between the two presets: a name, and the settings that are switched together.
DIFFERENCES: dict[str, tuple[str, ...]] = {
    "groups of 16 with 4-bit parameters": ("quant.group_size", "quant.param_bits"),
    "sweeps": ("ptq.sweeps",),
    "drift correction": ("ptq.align",),
    "coupled bitmap": ("wat.bitmap", "wat.lr_bitmap"),
    "relative loss": ("wat.loss", "wat.reg_weight", "aar.loss"),
    "larger learning rates": ("wat.lr_weight", "aar.lr_act"),
    "small batches, two passes": ("seq_len", "wat.batch_tokens", "wat.epochs", "aar.batch_tokens", "aar.epochs"),
    "activation ranges of 64 inputs": ("quant.act_group_size",),
    "KV cache with keys in groups of 64 tokens": ("quant.kv_group_size",),
    STAGE_4: ("stages",),
}
# What the presets have their own of, and all variants have from this benchmark's options: the text.
SAME = ("corpus", "ptq.tokens", "wat.tokens", "aar.tokens")
JUDGED_LENGTH = 1_024


@dataclass(frozen=True)
class Variant:
    """One run: its name, its settings, and how they differ from the first one's, in words."""

    label: str
    config: RunConfig
    changed: str


def variants(base: Mapping[str, Any], *, whole: bool) -> list[Variant]:
    """The runs in their order. ``base``: settings, by their path, that all of them have. Stage 4 needs the ``whole``
    model."""
    differences = {name: paths for name, paths in DIFFERENCES.items() if whole or name != STAGE_4}
    every = tuple(path for paths in differences.values() for path in paths)
    paper, standard = leaves(make_config("paper")), leaves(make_config("standard"))
    found: list[Variant] = []
    for name, paths in {PAPER: (), **differences, STANDARD: every}.items():
        settings = {path: standard[path] for path in paths} | dict(base)
        config = make_config("paper", assignments=tuple(f"{path}={json.dumps(v)}" for path, v in settings.items()))
        own = leaves(config)
        changes = [f"{path} {paper[path]} → {own[path]}" for path in paths if path not in base and path != "stages"]
        found.append(Variant(name, config, ", ".join(changes) if name in differences else ""))
    return found


def first_blocks(teacher: Teacher, number: int, folder: Path) -> Teacher:
    """The teacher with only its first ``number`` blocks, written to ``folder`` unless it is there, and read again.
    Raises ConfigError."""
    path, blocks = decoder_blocks(teacher.model)
    if number > len(blocks):
        raise ConfigError(f"--blocks {number}: {teacher.name} has {len(blocks)}")
    if not folder.is_dir():
        short: PreTrainedModel = share_copy(teacher.model)
        short.set_submodule(path, nn.ModuleList(list(decoder_blocks(short)[1])[:number]))
        short.config = copy.deepcopy(short.config)
        inner = short.config.get_text_config()
        inner.num_hidden_layers = number
        if getattr(inner, "layer_types", None):
            inner.layer_types = inner.layer_types[:number]
        with quiet(), new_folder(folder) as draft:
            teacher.tokenizer.save_pretrained(draft)
            short.save_pretrained(draft)
    return load_teacher(str(folder))


class Chain:
    """The runs of one teacher, in folders below ``work``; judged on windows (n, T) of token ids."""

    def __init__(self, teacher: Teacher, judged: Tensor, work: Path, *, whole: bool) -> None:
        self.teacher, self.judged, self.work, self.whole = teacher, judged, work, whole
        self.path, self.blocks = decoder_blocks(teacher.model)
        self.targets = self._last_outputs(teacher.model)
        self.hashes = weight_hashes(teacher.model)
        self.finished: dict[str, tuple[Path, Stage]] = {}
        self.corpus = cache(self._corpus)

    def _corpus(self, name: str, seq_len: int, tokens: int, seed: int) -> Corpus:
        return load_corpus(name, self.teacher.tokenizer, seq_len=seq_len, tokens=tokens, seed=seed)

    def measure(self, variant: Variant) -> dict[str, Any]:
        """The variant's row, from its folder if it is there already."""
        config = variant.config
        identity = json.dumps([config.model_dump(mode="json"), self.judged.tolist()])
        folder = self.work / hashlib.sha256(identity.encode()).hexdigest()[:16]
        corpus = self.corpus(config.corpus, config.seq_len, config.tokens, config.seed)
        row = folder / "row.json"
        if not row.is_file():
            self._take_over(config, folder, corpus)
            for _ in run(config, folder, request=lambda: None, teacher=self.teacher, corpus=corpus):
                pass
            write_file(row, json.dumps(self._judge(config, folder)).encode())
        for stage in config.stages:
            self.finished.setdefault(self._prefix(config, stage, corpus), (folder, stage))
        return {"label": variant.label, "changed": variant.changed} | json.loads(row.read_bytes())

    def _take_over(self, config: RunConfig, folder: Path, corpus: Corpus) -> None:
        """Copy the stages that another run has done with the same settings."""
        precision = make_accelerator(config.device, None).mixed_precision
        own = BlockStore(folder, fingerprint(config, self.hashes, corpus.hash, precision), config.stages)
        for stage in config.stages:
            other = self.finished.get(self._prefix(config, stage, corpus))
            if other is None:
                return
            for number in range(len(self.blocks)):
                if not own.path(stage, number).exists():
                    own.save(stage, number, BlockStore(other[0], None).finished(stage, number))

    @staticmethod
    def _prefix(config: RunConfig, stage: Stage, corpus: Corpus) -> str:
        """All that the states after a stage depend on, the teacher aside."""
        before = config.stages[: config.stages.index(stage) + 1]
        document = config.model_dump(mode="json", exclude={"preset", "device", "stages", "quant", *STAGES})
        document |= {name: getattr(config, name).model_dump(mode="json") for name in before}
        quant = config.precision(stage).model_dump(mode="json")
        return json.dumps([document, quant, before, corpus.hash], sort_keys=True)

    def _judge(self, config: RunConfig, folder: Path) -> dict[str, Any]:
        row: dict[str, Any] = {}
        for stage in config.stages:
            model = stage_model(config, folder, stage, self.teacher)
            row[f"stage_{stage_number(stage)}"] = relative_error(self._last_outputs(model), self.targets)
        if self.whole:
            row["perplexity"] = perplexity(model, self.judged).perplexity
        row["bits"] = bits_per_weight(self.blocks, block_formats(self.teacher.model, config.quant)[2])
        store, numbers = BlockStore(folder, None), range(len(self.blocks))
        states = [store.finished(stage, number) for stage in PAPER_STAGES[1:] for number in numbers]
        return row | {"undone": sum(state.loss_after >= state.loss_before for state in states)}

    def _last_outputs(self, model: PreTrainedModel) -> Tensor:
        return last_outputs(model, self.path, self.judged)


@torch.no_grad()
def last_outputs(model: PreTrainedModel, path: str, windows: Tensor) -> Tensor:
    """The output (n, T, hidden) of the last of a model's blocks, which are at ``path``, for token ids (n, T)."""
    kept: list[Tensor] = []

    def keep(block: nn.Module, args: Any, output: Any) -> None:
        kept.append((output if isinstance(output, Tensor) else output[0]).float())

    *_, last = model.get_submodule(path).children()
    handle = last.register_forward_hook(keep)
    try:
        for window in windows.split(1):
            model.base_model(input_ids=window.to(model.device), use_cache=False)
    finally:
        handle.remove()
    return torch.cat(kept)


def relative_error(outputs: Tensor, targets: Tensor) -> float:
    """The mean over tokens of ||target - output||^2 over the larger of the two squared norms; both (n, T, hidden)."""
    norms = torch.maximum(outputs.square().sum(-1), targets.square().sum(-1))
    return float(((outputs - targets).square().sum(-1) / norms.clamp_min(1e-12)).mean())


def compared(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The rows with ``change``: how much their last error is above that of the first row."""
    ends = [next(row[key] for key in ("stage_4", "stage_3") if row.get(key) is not None) for row in rows]
    return [dict(row) | {"change": end / ends[0] - 1} for row, end in zip(rows, ends, strict=True)]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The rows as a Markdown table."""
    stages = [f"stage_{stage_number(stage)}" for stage in STAGES]
    used = [key for key in (*stages, "perplexity") if any(key in row for row in rows)]
    lines = []
    for row in rows:
        figures = [
            "" if row.get(key) is None else f"{row[key]:.2f}" if key == used[-1] == "perplexity" else f"{row[key]:.5f}"
            for key in used
        ]
        lines.append([row["label"], f"{row['bits']:.2f}", *figures, f"{row['change']:+.1%}", str(row["undone"])])
    heads = ["", "bits", *(key.replace("_", " ") for key in used), "over the paper", "blocks not trained"]
    return markdown.table(heads, lines)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--blocks", type=count, help="the first ones of the model; default: all")
    parser.add_argument("--tokens", type=count, default=131_072, help="to learn from in each of the stages 1 to 3")
    parser.add_argument("--judge-tokens", type=count, default=8_192)
    parser.add_argument("--only", help="names of variants, joined by semicolons; the first one always runs")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a setting of all variants")
    parser.add_argument("--work", type=Path, default=Path("out/paper"), help="folder of the runs")
    options = parser.parse_args()
    teacher = open_teacher(options.model)
    total = len(decoder_blocks(teacher.model)[1])
    whole = options.blocks in (None, total)
    if not whole:
        name = f"{hashlib.sha256(teacher.name.encode()).hexdigest()[:8]}-{options.blocks}"
        teacher = first_blocks(teacher, options.blocks, options.work / "models" / name)
    base: dict[str, Any] = {"model": teacher.name, "corpus": options.corpus}
    base |= {f"{stage}.tokens": options.tokens for stage in PAPER_STAGES}
    for assignment in options.set:
        path, _, value = assignment.partition("=")
        base[path] = json.loads(value)
    runs = variants(base, whole=whole)
    if options.only is not None:
        runs = [one for one in runs if one.label in (PAPER, *options.only.split(";"))]
    length = min(JUDGED_LENGTH, *(one.config.seq_len for one in runs))
    load = load_corpus(options.corpus, teacher.tokenizer, seq_len=length, tokens=options.judge_tokens, part="tune")
    chain = Chain(teacher, load.sequences, options.work, whole=whole)
    rows: list[dict[str, Any]] = []
    for variant in runs:
        rows = compared([*rows, chain.measure(variant)])
        progress(f"{variant.label}: {json.dumps(rows[-1])}")
        if options.out:
            write_report(options.out, "paper", settings_of(options, "work"), rows)
    print(f"{options.corpus}, {options.tokens:,} tokens, {torch.get_num_threads()} threads, {date.today()}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
