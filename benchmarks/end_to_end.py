"""Measure the effect of the choices in stage 4: ``python -m benchmarks.end_to_end CHECKPOINT``.

    python -m lbllm quantize --set 'stages=["ptq","wat"]' --act-bits 16 --kv-bits 16 --out runs/blocks
    python -m benchmarks.end_to_end runs/blocks --tokens 20480
    python -m benchmarks.end_to_end runs/blocks --only "latent weights,reverse KL"

CHECKPOINT is a packed checkpoint, if possible one without stage 4. Each variant trains it further by a run of only
stage 4, on the same text, and is then evaluated as deployed, on the corpus' tune part, which nothing is trained on:
perplexity, KL(teacher || student) in nats per token, and the share of tokens with the same most likely next one.
"""

from __future__ import annotations

import tempfile
import time
from dataclasses import dataclass
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.checkpoints.find import open_teacher
from lbllm.config import RunConfig, parse_config
from lbllm.errors import ConfigError
from lbllm.events import BlockDone
from lbllm.measure.perplexity import Divergence, divergence
from lbllm.models.teacher import Teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.pipeline.run import run
from lbllm.pipeline.start import settings_to_go_on
from lbllm.texts.corpus import Corpus, load_corpus

LATENT = {"lr_weight": 2.5e-3}
VARIANTS: dict[str, dict[str, Any]] = {
    "group parameters alone": {},
    "latent weights": LATENT,
    "latent weights at twice the rate": {"lr_weight": 5e-3},
    "latent weights at half the rate": {"lr_weight": 1.25e-3},
    "steps of 512 tokens": LATENT | {"batch_tokens": 512},
    "steps of 2048 tokens": LATENT | {"batch_tokens": 2_048},
    "sequences of 128": LATENT | {"seq_len": 128},
    "reverse KL": LATENT | {"loss": "reverse_kl"},
    "CAKLD": LATENT | {"loss": "cakld"},
    "EAKLD": LATENT | {"loss": "eakld"},
    "concrete score": LATENT | {"loss": "concrete_score"},
    "outputs of blocks in the loss": LATENT | {"feature_weight": 1.0},
}


@dataclass(frozen=True)
class Result:
    """A variant's figures, whether its training was undone because its own loss became worse, and its seconds."""

    variant: str
    found: Divergence
    taken_back: bool
    seconds: float

    @property
    def label(self) -> str:
        return f"{self.variant} (taken back)" if self.taken_back else self.variant


def measure(config: RunConfig, teacher: Teacher, corpus: Corpus, judged: Tensor, variants: list[str]) -> list[Result]:
    """The checkpoint that ``config`` starts from as it is, then each variant trained from there on ``corpus``, judged
    on windows (n, T). Raises LbllmError."""
    results: list[Result] = []
    for variant in variants:
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            changed = config.model_copy(update={"e2e": config.e2e.model_copy(update=VARIANTS[variant])})
            events = list(run(changed, folder, request=lambda: None, teacher=teacher, corpus=corpus))
            seconds = time.perf_counter() - began
            if not results:
                begun = divergence(teacher.model, stage_model(changed, folder, "start", teacher), judged)
                results.append(Result("before", begun, False, 0.0))
            found = divergence(teacher.model, stage_model(changed, folder, "e2e", teacher), judged)
        taken_back = any(event.diverged for event in events if isinstance(event, BlockDone))
        results.append(Result(variant, found, taken_back, seconds))
        progress(f"{variant}: KL {found.kl:.4f} ({seconds:.0f} s)")
    return results


def table(results: list[Result]) -> str:
    """The results as a Markdown table."""
    lines = []
    for result in results:
        found = result.found
        figures = [f"{found.student_perplexity:.2f}", f"{found.kl:.4f}", f"{found.top1_agreement:.1%}"]
        lines.append([result.label, *figures, f"{result.seconds:.0f}"])
    return markdown.table(["", "perplexity", "KL", "same most likely token", "seconds"], lines)


def rows(results: list[Result]) -> list[dict[str, Any]]:
    """The results as ``--out`` keeps them."""
    kept: list[dict[str, Any]] = []
    for result in results:
        found = result.found
        figures = {"perplexity": found.student_perplexity, "kl": found.kl, "same_top": found.top1_agreement}
        kept.append({"variant": result.label} | figures | {"seconds": round(result.seconds)})
    return kept


def chosen(only: str) -> list[str]:
    """The variants that ``--only`` names. Raises ConfigError."""
    names = only.split(",")
    for name in names:
        if name not in VARIANTS:
            raise ConfigError(f"--only {name}: choose from {', '.join(VARIANTS)}")
    return names


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", help="packed: its folder, a finished run's id, or shipped")
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--tokens", type=int, default=20_480, help="to train on")
    parser.add_argument("--judge-tokens", type=int, default=8_192)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--only", default=",".join(VARIANTS), help="variants joined by commas")
    options = parser.parse_args()
    variants = chosen(options.only)
    shared = {"corpus": options.corpus, "seq_len": options.seq_len}
    e2e = {"tokens": options.tokens, "seq_len": options.seq_len}
    config = parse_config(settings_to_go_on(options.checkpoint) | shared | {"e2e": e2e})
    teacher = open_teacher(config.model)
    load = partial(load_corpus, options.corpus, teacher.tokenizer, seq_len=options.seq_len)
    judged = load(tokens=options.judge_tokens, part="tune").sequences
    # In another order than the earlier stages read it: a run undoes its training if that made the first of its
    # text worse, and what those stages have fitted gets worse by learning anything else.
    text = load(tokens=options.tokens, seed=1)
    results = measure(config, teacher, text, judged, variants)
    threads = f"{torch.get_num_threads()} threads, {date.today()}"
    print(f"{options.tokens:,} tokens of {options.corpus}, judged on {judged.numel():,} others, {threads}\n")
    print(table(results))
    if options.out:
        write_report(options.out, "end_to_end", settings_of(options), rows(results))


if __name__ == "__main__":
    main()
