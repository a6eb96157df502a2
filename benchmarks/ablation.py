"""Measure the effect of each stage, and of each choice in the stages, on single blocks of a real model.

    python -m benchmarks.ablation --blocks 2,14,27
    python -m benchmarks.ablation --blocks 14 --corpus wikipedia --parts wat

Printed is each block's relative output error (mean over tokens of ||teacher - student||^2 over the larger of the two
squared norms), first on the corpus' tune part, which nothing is trained on, then on the text that was trained on.

Parts: ``stages`` leaves out one stage, or one idea of the paper, at a time; ``ptq``, ``wat`` and ``aar`` vary one
setting of a stage; ``groups`` gives the layers of a block group sizes of their own (layers named as in LLaMA).
Training of weights and activations together has as many steps as stages 2 and 3 have.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from functools import cached_property, partial
from typing import Any, Literal

import torch

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message, progress
from benchmarks.one_block import Made, OneBlock
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import open_teacher
from lbllm.config import DEFAULT_MODEL
from lbllm.errors import ConfigError
from lbllm.machine import float32_products
from lbllm.quant.kv_cache import KVFormat
from lbllm.sections import AarConfig, ParamBits, PtqConfig, WatConfig
from lbllm.texts.corpus import load_corpus

PTQ_VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "no coordinate descent": {"sweeps": 0},
    "no alignment to the teacher's inputs": {"align": 0.0},
    "damping 0.01": {"damping": 0.01},
    "alignment damping 0.05": {"align_damping": 0.05},
}
WAT_VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "plain MSE": {"loss": "mse"},
    "relaxed bitmap, polarized": {"bitmap": "relaxed"},
    "relaxed bitmap, lambda 0": {"bitmap": "relaxed", "reg_weight": 0.0},
    "relaxed bitmap, lambda / 10": {"bitmap": "relaxed", "reg_weight": 3.0},
    "relaxed bitmap, lambda * 10": {"bitmap": "relaxed", "reg_weight": 300.0},
    "relaxed bitmap, beta 2 throughout": {"bitmap": "relaxed", "beta_start": 2.0},
    "relaxed bitmap, beta 20 throughout": {"bitmap": "relaxed", "beta_end": 20.0},
    "levels only": {"lr_weight": 0.0},
    "learning rates: weights / 10, levels / 5": {"lr_weight": 2e-3, "lr_levels": 1e-3},
    "learning rates: weights * 2, levels * 4": {"lr_weight": 4e-2, "lr_levels": 2e-2},
    "batches of 2,048 tokens": {"batch_tokens": 2_048},
}
AAR_VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "searched knee, not trained": {"epochs": 0},
    "no tails (plain A4), trained": {"tail": 0},
    "1 step a tail": {"tail": 1},
    "2 steps a tail": {"tail": 2},
    "4 steps a tail": {"tail": 4},
    "levels not trained": {"lr_levels": 0.0},
    "knee and clips not trained": {"lr_act": 0.0},
    "KV cache in 16 bits": {"kv": KVFormat(16)},
    "KV cache with keys in groups of 64 tokens": {"kv": KVFormat(4, 64, 1)},
    "ranges of 64 inputs": {"act_group_size": 64},
    "ranges of 32 inputs": {"act_group_size": 32},
    "ranges of 64 inputs, searched knee, not trained": {"act_group_size": 64, "epochs": 0},
    "ranges of 64 inputs, no tails": {"act_group_size": 64, "tail": 0},
}
ATTENTION, GATES, DOWN = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "up_proj"), ("down_proj",)
# In the embedded model all of these have as many group parameters as groups of 64 everywhere.
GROUP_SIZES: dict[str, dict[str, int]] = {
    "one size everywhere": {},
    "attention 32, MLP 96": dict.fromkeys(ATTENTION, 32) | dict.fromkeys(GATES + DOWN, 96),
    "down 32, others 96": dict.fromkeys(DOWN, 32) | dict.fromkeys(ATTENTION + GATES, 96),
    "gate and up 48, others 96": dict.fromkeys(GATES, 48) | dict.fromkeys(ATTENTION + DOWN, 96),
    "gate and up 96, others 48": dict.fromkeys(GATES, 96) | dict.fromkeys(ATTENTION + DOWN, 48),
}
# With parameters in 8 or 4 bits, smaller groups take no more bits than groups of 64 with float16 ones.
EIGHT_BITS: dict[str, dict[str, int]] = {
    "8 bits, one size everywhere": {},
    "8 bits, attention and down 32": dict.fromkeys(ATTENTION + DOWN, 32),
    "8 bits, gate and up 32": dict.fromkeys(GATES, 32),
    "8 bits, 48 everywhere": dict.fromkeys(ATTENTION + GATES + DOWN, 48),
}
FOUR_BITS: dict[str, dict[str, int]] = {
    "4 bits, 16 everywhere but q_proj, 32": dict.fromkeys(ATTENTION[1:] + GATES + DOWN, 16) | {"q_proj": 32},
    "4 bits, 32 everywhere": dict.fromkeys(ATTENTION + GATES + DOWN, 32),
}
SEARCH = AarConfig(epochs=0)
RELAXED = WatConfig(bitmap="relaxed")

Variant = tuple[str, str, Made]


@dataclass(frozen=True)
class Result:
    """One variant on one block: its errors on the text that was trained on and on the other, or where it diverged.
    ``stages``: the stages that trained it, or the format that they made."""

    part: str
    stages: str
    variant: str
    trained: float
    other: float
    seconds: float
    diverged: str


class Ablation:
    """The variants on one block, each made on request; common first steps are computed once."""

    def __init__(self, block: OneBlock) -> None:
        self.block = block

    @cached_property
    def first(self) -> Made:
        """The block after stage 1."""
        return self.block.initialize(PtqConfig())

    @cached_property
    def second(self) -> Made:
        """The block after stages 1 and 2."""
        return self.block.train(self.first, WatConfig())

    def stages(self) -> Iterator[Variant]:
        """One stage, or one idea of the paper, left out at a time."""
        block, weights = self.block, "W(1+1)A16"
        plain = block.cluster()
        yield weights, "plain clustering", plain
        first = self.first
        yield weights, "stage 1", first
        trained = block.train(plain, WatConfig())
        yield weights, "stage 2 without PTQ initialization", trained
        second = self.second
        yield weights, "stages 1, 2", second
        relaxed = block.train(first, RELAXED)
        yield weights, "stages 1, 2, relaxed bitmap", relaxed
        free = block.train(first, RELAXED.model_copy(update={"reg_weight": 0.0}))
        yield weights, "stages 1, 2, relaxed bitmap, no polarization", free
        signs = block.train(block.initialize(PtqConfig(), "w1"), WatConfig())
        yield "W1A16", "stages 1, 2, no bitmap", signs
        both = "W(1+1)A4KV4"
        yield both, "stage 1, knee searched", block.refine(first, SEARCH)
        yield both, "stages 1, 2, knee searched", block.refine(second, SEARCH)
        yield both, "stage 3 from plain clustering", block.refine(plain, AarConfig())
        yield both, "stages 1, 3", block.refine(first, AarConfig())
        yield both, "stages 2, 3 without PTQ initialization", block.refine(trained, AarConfig())
        yield both, "all three", block.refine(second, AarConfig())
        yield both, "all three, relaxed bitmap", block.refine(relaxed, AarConfig())
        yield both, "all three, relaxed bitmap, no polarization", block.refine(free, AarConfig())
        yield both, "all three, no knee", block.refine(second, AarConfig(), tail=0)
        yield "W1A4KV4", "all three, no bitmap", block.refine(signs, AarConfig())
        # As many steps as stages 2 and 3 have.
        together = {"epochs": WatConfig().epochs + AarConfig().epochs}
        for name, start, config in (
            ("stage 1, then all together", first, WatConfig()),
            ("stage 1, then all together, relaxed bitmap", first, RELAXED),
            (
                "stage 1, then all together, relaxed bitmap, plain MSE",
                first,
                RELAXED.model_copy(update={"loss": "mse"}),
            ),
            ("plain clustering, then all together", plain, WatConfig()),
        ):
            yield both, name, block.join(start, config.model_copy(update=together), AarConfig())

    def ptq(self) -> Iterator[Variant]:
        """Settings of stage 1."""
        for name, values in PTQ_VARIANTS.items():
            yield "1", name, self.block.initialize(PtqConfig(**values)) if values else self.first

    def wat(self) -> Iterator[Variant]:
        """Settings of stage 2."""
        for name, values in WAT_VARIANTS.items():
            yield "2", name, self.block.train(self.first, WatConfig(**values)) if values else self.second
        twice = WatConfig(epochs=2 * WatConfig().epochs)
        yield "2", "twice the passes", self.block.train(self.first, twice)
        yield "2", "teacher's inputs too", self.block.train(self.first, WatConfig(), both_streams=True)

    def aar(self) -> Iterator[Variant]:
        """Settings of stage 3."""
        for name, values in AAR_VARIANTS.items():
            how = {key: value for key, value in values.items() if key in ("tail", "kv", "act_group_size")}
            config = AarConfig(**{key: value for key, value in values.items() if key not in how})
            yield "3", name, self.block.refine(self.second, config, **how)

    def groups(self) -> Iterator[Variant]:
        """Group sizes by layer, after stages 1 and 2."""
        for name, sizes in GROUP_SIZES.items():
            start = self.block.initialize(PtqConfig(), group_sizes=sizes) if sizes else None
            yield "1, 2", name, self.block.train(start, WatConfig()) if start else self.second
        fewer: tuple[tuple[ParamBits, dict[str, dict[str, int]]], ...] = ((8, EIGHT_BITS), (4, FOUR_BITS))
        for bits, variants in fewer:
            for name, sizes in variants.items():
                start = self.block.initialize(PtqConfig(), group_sizes=sizes, param_bits=bits)
                yield "1, 2", name, self.block.train(start, WatConfig())


PARTS: dict[str, Callable[[Ablation], Iterator[Variant]]] = {
    "stages": Ablation.stages,
    "ptq": Ablation.ptq,
    "wat": Ablation.wat,
    "aar": Ablation.aar,
    "groups": Ablation.groups,
}


def measure(block: OneBlock, parts: list[str], report: Callable[[str], None]) -> list[Result]:
    """All variants of the parts on one block; each is reported as soon as it is ready."""
    ablation, results = Ablation(block), []
    began = time.perf_counter()
    for name in parts:
        for stages, variant, made in PARTS[name](ablation):
            trained, other = block.errors(made)
            seconds = time.perf_counter() - began
            results.append(Result(name, stages, variant, trained, other, seconds, made.diverged))
            report(f"block {block.number}, {stages}, {variant}: {_cell(results[-1], other)} ({seconds:.0f} s)")
            began = time.perf_counter()
    return results


def table(results: dict[int, list[Result]], error: Literal["other", "trained"]) -> str:
    """The errors as a Markdown table with a column for each block."""
    lines = []
    for same in zip(*results.values(), strict=True):
        cells = [_cell(result, getattr(result, error)) for result in same]
        seconds = sum(result.seconds for result in same)
        lines.append([same[0].stages, same[0].variant, *cells, f"{seconds:.0f}"])
    return markdown.table(["", "variant", *(f"block {number}" for number in results), "seconds"], lines)


def rows(results: dict[int, list[Result]]) -> list[dict[str, Any]]:
    """The results as ``--out`` keeps them: a row has the errors of all blocks, or where they diverged."""
    kept: list[dict[str, Any]] = []
    for same in zip(*results.values(), strict=True):
        first = same[0]
        row: dict[str, Any] = {"part": first.part, "format" if first.part == "stages" else "stages": first.stages}
        row["variant"] = first.variant
        for number, result in zip(results, same, strict=True):
            row[f"block_{number}"] = result.diverged or result.other
            row[f"block_{number}_trained"] = result.diverged or result.trained
        kept.append(row | {"seconds": sum(result.seconds for result in same)})
    return kept


def _cell(result: Result, error: float) -> str:
    return result.diverged or f"{error:.5f}"


def chosen(parts: str, blocks: str) -> tuple[list[str], list[int]]:
    """What the options name. Raises ConfigError."""
    names = parts.split(",")
    for name in names:
        if name not in PARTS:
            raise ConfigError(f"--parts {name}: choose from {', '.join(PARTS)}")
    for number in blocks.split(","):
        if not number.isdigit():
            raise ConfigError(f"--blocks {number}: give numbers of blocks, from 0, joined by commas")
    return names, [int(number) for number in blocks.split(",")]


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--blocks", default="2", help="numbers joined by commas")
    parser.add_argument("--before", type=int, default=2, help="binarized blocks before each of them")
    parser.add_argument("--tokens", type=int, default=8_192, help="to train on")
    parser.add_argument("--judge-tokens", type=int, default=4_096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--parts", default=",".join(PARTS), help="joined by commas")
    options = parser.parse_args()
    results: dict[int, list[Result]] = {}
    parts, numbers = chosen(options.parts, options.blocks)
    teacher = open_teacher(options.model)
    load = partial(load_corpus, options.corpus, teacher.tokenizer, seq_len=options.seq_len)
    trained = load(tokens=options.tokens).sequences
    judged = load(tokens=options.judge_tokens, part="tune").sequences
    for number in numbers:
        block = OneBlock(teacher, trained, judged, number, before=options.before, group_size=options.group_size)
        with float32_products():
            results[number] = measure(block, parts, progress)
    print(f"{options.corpus}, group size {options.group_size}, {torch.get_num_threads()} threads, {date.today()}")
    print(f"\nOn {judged.numel():,} tokens of other text:\n\n{table(results, 'other')}")
    print(f"\nOn the {trained.numel():,} tokens that were trained on:\n\n{table(results, 'trained')}")
    if options.out:
        write_report(options.out, "ablation", settings_of(options), rows(results))


if __name__ == "__main__":
    main()
