"""Measure what single ideas of other papers change in stages 1, 2 and 4, and what a restart costs, at equal bits and
tokens.

    python -m benchmarks.levers --work out/levers
    python -m benchmarks.levers --work out/levers --parts end,restart --seeds 0,1,2 --tokens 65536 --out FILE.json
    python -m benchmarks.levers --work out/levers --only "latent weights;token similarity, weight 1"

Parts: ``end``, levers of stage 4, all from one start (stages 1 and 2 of the whole model); ``restart``, stage 4 twice,
the second time from the latent weights that the first one left, or from levels and codes alone; ``blocks``, levers of
stage 2 on the first blocks, from one stage 1, judged as a hybrid with the teacher's other blocks, and by the relative
error of what the last of them gives; ``again``, the question of ``restart`` for stage 2 of these blocks, which takes a
tenth of the time; ``guided``, their stage 1 with Hessians that are weighted by the squared gradient of the end loss;
``bits``, their stage 1 with the formats of layers chosen by sensitivity, at the bits of groups of 32.

Each cell, which is one variant with one seed, is stored in WORK when it is finished and not computed again, so that the
command can be stopped and given again with more seeds or variants. A seed decides the text and its order. Models are
judged on wiki.valid and on the tune part of the corpus, which nothing is trained on.
"""

from __future__ import annotations

import hashlib
import json
import statistics
from collections.abc import Callable, Iterator, Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.levers_bits import ESTIMATED, MEASURED, UNIFORM, quant_of
from benchmarks.levers_blocks import BLOCK_LEVERS, FirstBlocks
from benchmarks.levers_end import (
    END_LEVERS,
    RULES,
    WITH_LATENTS,
    EndLever,
    Rule,
    agreement,
    at_level,
    clipped,
    kept_or_level,
    restarted,
    train,
)
from benchmarks.levers_guided import GUIDES, guided_blocks
from benchmarks.levers_model import Bench, Clock, State, Text, load_states, save_states
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import open_teacher
from lbllm.config import DEFAULT_MODEL, RunConfig, make_config
from lbllm.errors import ConfigError
from lbllm.files import write_file
from lbllm.pipeline.run import run
from lbllm.quant.plan import bits_per_weight
from lbllm.sections import E2eConfig
from lbllm.stages.block_store import BlockStore
from lbllm.texts.corpus import load_corpus
from lbllm.texts.windows import evaluation_tokens

BEFORE = "before it is trained again"
# Rules that begin with what is best for each weight alone, computed from a text, instead of the teacher's weight.
OPTIMA: dict[str, Rule] = {
    "best alone where it has the code, else the level": kept_or_level,
    "best alone, clipped into the cell": clipped,
}
# What the others of a part are compared with.
FIRST = {
    "end": "latent weights",
    "restart": WITH_LATENTS,
    "blocks": "stage 2",
    "again": WITH_LATENTS,
    "guided": "one Hessian for a layer",
    "bits": UNIFORM,
}
VARIANTS = {
    "end": list(END_LEVERS),
    "restart": [BEFORE, WITH_LATENTS, *RULES],
    "blocks": ["stage 1", *BLOCK_LEVERS],
    "again": [BEFORE, WITH_LATENTS, *RULES, *OPTIMA],
    "guided": list(GUIDES),
    "bits": [UNIFORM, ESTIMATED, MEASURED],
}
JUDGED = ("wiki", "tune")
MEASURED_KEYS = [f"{kind}_{text}" for text in JUDGED for kind in ("perplexity", "kl", "error")]
_PLAIN = BLOCK_LEVERS["stage 2"]


class Levers:
    """The cells of one model in a folder."""

    def __init__(
        self, bench: Bench, config: RunConfig, work: Path, tokens: int, blocks: int, *, errors_alone: bool
    ) -> None:
        self.bench, self.config = bench, config
        self.tokens, self.count, self.errors_alone = tokens, blocks, errors_alone
        self.work = work / _hash([config.model_dump(mode="json"), bench.teacher.name])
        self.text = Text(config.corpus, config.e2e_seq_len)
        self.e2e: E2eConfig = config.e2e
        judged = {name: windows.tolist() for name, windows in bench.judged.items()}
        self.identity = [judged, tokens, blocks, errors_alone]  # of a cell, beside its name

    def start(self) -> list[State]:
        """The whole model after stages 1 and 2, with stage 1's latent weights."""
        folder = self.work / "start"
        if not (folder / "checkpoint").is_dir():
            config, teacher = self.config, self.bench.teacher
            # Given its text, the run measures nothing on the held-out part.
            text = load_corpus(config.corpus, teacher.tokenizer, seq_len=config.seq_len, tokens=config.tokens)
            for _ in run(config, folder, request=lambda: None, teacher=teacher, corpus=text):
                pass
        store, states = BlockStore(folder, None), []
        for number in range(len(self.bench.blocks)):
            first = store.finished("ptq", number).tensors
            latents = {name: tensor for name, tensor in first.items() if name.endswith(".latent")}
            states.append(store.finished("wat", number).tensors | latents)
        return states

    def cells(
        self, part: str, variants: Sequence[str], seeds: Sequence[int], *, stored: bool = False
    ) -> Iterator[dict[str, Any]]:
        """The rows of a part, seed by seed, each stored before it is yielded. ``stored``: none are made."""
        make: Callable[[str, int], dict[str, Any]] = getattr(self, part)
        for seed in seeds:
            for variant in variants:
                path = self.work / "cells" / f"{part}-{seed}-{_hash([variant, self.identity])}.json"
                if stored and not path.is_file():
                    continue
                if not path.is_file():
                    clock = Clock()
                    row = {"part": part, "variant": variant, "seed": seed} | make(variant, seed)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    write_file(path, json.dumps(row | {"seconds": clock.seconds()}).encode())
                yield json.loads(path.read_bytes())

    def end(self, variant: str, seed: int) -> dict[str, Any]:
        """A lever of stage 4."""
        states = self.start()
        sequences = self.text.sequences(self.bench.teacher, self.tokens, seed)
        lever = END_LEVERS[variant]
        latents = restarted(self.bench, states, at_level if lever.from_levels else None)
        ended, loss = train(self.bench, states, latents, sequences, self.e2e, lever, seed)
        return self.bench.judge(ended) | {"loss": loss}

    def restart(self, variant: str, seed: int) -> dict[str, Any]:
        """Stage 4 once more, on other text than the first time."""
        path = self.work / f"restart-{self.tokens}.safetensors"
        if not path.is_file():
            begun = self.start()
            sequences = self.text.sequences(self.bench.teacher, self.tokens, 500)
            ended, _ = train(
                self.bench, begun, restarted(self.bench, begun, None), sequences, self.e2e, EndLever(), 500
            )
            save_states(path, ended)
        states = load_states(path)
        if variant == BEFORE:
            return self.bench.judge(states)
        latents = restarted(self.bench, states, RULES.get(variant))
        sequences = self.text.sequences(self.bench.teacher, self.tokens, seed)
        ended, loss = train(self.bench, states, latents, sequences, self.e2e, EndLever(), seed)
        same = {} if variant != WITH_LATENTS else {"teachers_code": agreement(self.bench, states)}
        return self.bench.judge(ended) | {"loss": loss} | same

    def blocks(self, variant: str, seed: int) -> dict[str, Any]:
        """A lever of stage 2 on the first blocks."""
        return self._stage_2(self._kept("blocks", self._first_stage), variant, seed)

    def again(self, variant: str, seed: int) -> dict[str, Any]:
        """Stage 2 of the first blocks once more, on other text than the first time."""

        def first_time() -> list[State]:
            return list(self._chain(501).stage_2(self._kept("blocks", self._first_stage), self.config.wat, _PLAIN, 501))

        states = self._kept("again", first_time)
        if variant == BEFORE:
            return self._judged(states)
        if variant in OPTIMA:
            best = self._chain(seed).optima(states, self.config.ptq)
            begun = restarted(self.bench, states, OPTIMA[variant], best)
        else:
            begun = restarted(self.bench, states, RULES.get(variant))
        for state, latents in zip(states, begun, strict=True):
            state |= {f"{name}.latent": latent for name, latent in latents.items()}
        return self._stage_2(states, "stage 2", seed)

    def _chain(self, seed: int) -> FirstBlocks:
        text = Text(self.config.corpus, self.config.seq_len)
        return FirstBlocks(self.bench, self.count, text.sequences(self.bench.teacher, self.tokens, seed))

    def _first_stage(self) -> list[State]:
        return list(self._chain(500).stage_1(self.config.ptq))

    def _kept(self, name: str, make: Callable[[], list[State]]) -> list[State]:
        """States of the first blocks that several cells begin with, made once."""
        path = self.work / f"{name}-{self.count}-{self.tokens}.safetensors"
        if not path.is_file():
            save_states(path, make())
        return load_states(path)

    def _stage_2(self, states: list[State], variant: str, seed: int) -> dict[str, Any]:
        chain = self._chain(seed)
        if variant != "stage 1":
            states = list(chain.stage_2(states, self.config.wat, BLOCK_LEVERS[variant], seed))
        return self._judged(states)

    def _judged(self, states: list[State]) -> dict[str, Any]:
        chain = self._chain(500)
        errors = {f"error_{name}": chain.error(states, windows) for name, windows in self.bench.judged.items()}
        return errors if self.errors_alone else errors | self.bench.judge(states)

    def guided(self, variant: str, seed: int) -> dict[str, Any]:
        """Stage 1 of the first blocks with other Hessians."""
        sequences = Text(self.config.corpus, self.config.seq_len).sequences(self.bench.teacher, self.tokens, seed)
        chain = FirstBlocks(self.bench, self.count, sequences)
        return self.bench.judge_blocks(guided_blocks(chain, self.config.ptq, GUIDES[variant]))

    def bits(self, variant: str, seed: int) -> dict[str, Any]:
        """Stage 1 of the first blocks in formats chosen layer by layer."""
        sequences = Text(self.config.corpus, self.config.seq_len).sequences(self.bench.teacher, self.tokens, seed)
        quant = quant_of(variant, self.bench, self.count, sequences)
        bench = Bench(self.bench.teacher, quant, self.bench.judged)
        found = bench.judge(list(FirstBlocks(bench, self.count, sequences).stage_1(self.config.ptq)))
        bits = bits_per_weight(bench.blocks[: self.count], bench.formats[: self.count])
        return found | {"bits": bits}


def _hash(document: Any) -> str:
    return hashlib.sha256(json.dumps(document).encode()).hexdigest()[:10]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each variant: its means over the seeds, and how its perplexities, or without them its errors, differ
    from those of the part's first variant with the same seeds: the mean, the least and the most of the relative
    differences on both texts."""
    by_cell = {(row["part"], row["variant"], row["seed"]): row for row in rows}
    found: list[dict[str, Any]] = []
    for part, variant in dict.fromkeys((row["part"], row["variant"]) for row in rows):
        mine = [row for row in rows if (row["part"], row["variant"]) == (part, variant)]
        one: dict[str, Any] = {"part": part, "variant": variant, "seeds": len(mine)}
        one |= {key: statistics.fmean(row[key] for row in mine) for key in MEASURED_KEYS if key in mine[0]}
        compared = "perplexity" if "perplexity_wiki" in one else "error"
        changes = [
            row[f"{compared}_{text}"] / first[f"{compared}_{text}"] - 1
            for text in JUDGED
            for row in mine
            if (first := by_cell.get((part, FIRST[part], row["seed"]))) is not None
        ]
        if changes:
            one |= {"change": statistics.fmean(changes), "least": min(changes), "most": max(changes)}
        found.append(one | {"seconds": sum(row["seconds"] for row in mine)})
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The summary as a Markdown table."""
    lines = []
    for row in rows:
        figures = ["" if key not in row else _shown(key, row[key]) for key in MEASURED_KEYS]
        change = f"{row['change']:+.2%} ({row['least']:+.2%} to {row['most']:+.2%})" if "change" in row else ""
        lines.append([row["part"], row["variant"], str(row["seeds"]), *figures, change, f"{row['seconds']:.0f}"])
    heads = [key.replace("_", ", ") for key in MEASURED_KEYS]
    return markdown.table(["", "variant", "seeds", *heads, "change to the first", "seconds"], lines)


def _shown(key: str, value: float) -> str:
    return f"{value:.3f}" if key.startswith("perplexity") else f"{value:.5f}"


def chosen(parts: str, only: str | None) -> dict[str, list[str]]:
    """The variants of each part that the options name, the first of a part always among them. Raises ConfigError."""
    for part in parts.split(","):
        if part not in VARIANTS:
            raise ConfigError(f"--parts {part}: choose from {', '.join(VARIANTS)}")
    wanted = None if only is None else only.split(";")
    known = [name for part in parts.split(",") for name in VARIANTS[part]]
    for name in wanted or []:
        if name not in known:
            raise ConfigError(f"--only {name}: choose from {'; '.join(known)}")
    return {
        part: [name for name in VARIANTS[part] if wanted is None or name in (FIRST[part], *wanted)]
        for part in parts.split(",")
    }


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--work", type=Path, default=Path("out/levers"), help="folder of the start and the cells")
    parser.add_argument("--parts", default=",".join(VARIANTS), help="joined by commas")
    parser.add_argument("--only", help="variants, joined by semicolons; the first of a part always runs")
    parser.add_argument("--stored", action="store_true", help="compute nothing, show the cells that WORK has")
    parser.add_argument("--seeds", default="0,1,2", help="joined by commas")
    parser.add_argument("--start-tokens", type=count, default=8_192, help="of stages 1 and 2 of the start")
    parser.add_argument("--tokens", type=count, default=8_192, help="that a lever is trained on")
    parser.add_argument("--blocks", type=count, default=10, help="first blocks of part blocks")
    parser.add_argument("--errors-alone", action="store_true", help="parts blocks and again: no perplexity, no KL")
    parser.add_argument("--judge-tokens", type=count, default=4_096, help="of each of the two texts")
    parser.add_argument("--valid", default="wikitext-2-raw/wiki.valid.raw", help="a text file to judge on")
    options = parser.parse_args()
    wanted = chosen(options.parts, options.only)
    seeds = [int(seed) for seed in options.seeds.split(",")]
    config = make_config(
        "quick",
        {
            "model": options.model,
            "corpus": options.corpus,
            "stages": ("ptq", "wat"),
            "ptq": {"tokens": options.start_tokens},
            "wat": {"tokens": options.start_tokens},
            "e2e": {"lr_weight": 2.5e-3, "batch_tokens": 512},
        },
    )
    teacher = open_teacher(options.model)
    windows = -(-options.judge_tokens // config.seq_len)
    judged: dict[str, Tensor] = {
        "wiki": evaluation_tokens(options.valid, teacher.tokenizer, seq_len=config.seq_len, limit=windows),
        "tune": load_corpus(
            options.corpus, teacher.tokenizer, seq_len=config.seq_len, tokens=options.judge_tokens, part="tune"
        ).sequences,
    }
    bench = Bench(teacher, config.quant, judged)
    levers = Levers(bench, config, options.work, options.tokens, options.blocks, errors_alone=options.errors_alone)
    rows: list[dict[str, Any]] = []
    for part, variants in wanted.items():
        for row in levers.cells(part, variants, seeds, stored=options.stored):
            rows.append(row)
            figures = ", ".join(f"{key} {row[key]:.4f}" for key in MEASURED_KEYS if key in row)
            progress(f"{part}, {row['variant']}, seed {row['seed']}: {figures} ({row['seconds']:.0f} s)")
            if options.out:
                write_report(options.out, "levers", settings_of(options, "work"), summary(rows))
    print(f"{options.corpus}, {options.tokens:,} tokens, {torch.get_num_threads()} threads, {date.today()}\n")
    print(table(summary(rows)))


if __name__ == "__main__":
    main()
