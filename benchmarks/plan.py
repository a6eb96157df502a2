"""Plans against one format for all layers, at equal bits, on unseen text: ``python -m benchmarks.plan WORK``.

    python -m benchmarks.plan out/plan --corpus wikitext2 --text wikitext-2-raw/wiki.valid.raw

A plan is made from --corpus for each budget, the bits of some formats for all layers. Plans and formats are binarized
by stage 1 on the same text, and measured on the text of the plan and on windows of --text that nothing has seen: KL to
the teacher in nats per token. For each budget the plan is compared with the format for all layers that has the least KL
on the unseen text, among all that a plan can choose of 2 bits to the greatest budget. WORK keeps what is measured, so a
stopped benchmark goes on.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.config import DEFAULT_MODEL, RunConfig, make_config
from lbllm.errors import ConfigError
from lbllm.files import write_file
from lbllm.models.teacher import load_tokenizer, skeleton
from lbllm.planning.candidates import ANCHORS, REFERENCE, candidates, format_words, made
from lbllm.planning.measuring import Bench, Judge
from lbllm.planning.plan import Choice, Plan, make_plan
from lbllm.planning.store import save_study
from lbllm.planning.study import Study
from lbllm.planning.target import Target
from lbllm.sections import LayerFormat
from lbllm.texts.windows import evaluation_tokens

# Formats for all layers whose bits are the budgets. Two of the anchors come first.
UNIFORM: tuple[LayerFormat, ...] = (*ANCHORS[1:], REFERENCE, ANCHORS[0], made("w1+1+1", 32, 4))


class Work:
    """Models that are measured once: their KL on the text of the plans and on unseen windows of token ids (n, T), in a
    file of ``folder``. ``stored``: nothing is measured."""

    def __init__(self, bench: Bench, windows: Tensor, folder: Path, *, stored: bool = False) -> None:
        self.bench, self.windows, self.file, self.stored = bench, windows, folder / "measured.json", stored
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, dict[str, float]] = json.loads(self.file.read_text()) if self.file.is_file() else {}
        self.study: Study = bench.layers()

    @cached_property
    def judge(self) -> Judge:
        """What measures on the unseen text."""
        return Judge(self.bench.teacher, self.windows)

    def unseen(self, formats: Sequence[int], what: str, *, told: bool = True) -> float | None:
        """The KL of a choice of formats on the unseen text. If plans are ``told`` of it, that on their own text joins
        the study. None where it would have to be measured, and nothing is."""
        key = ",".join(map(str, formats))
        if key not in self.known or (told and self.study.known(formats) is None):
            if self.stored:
                return None
            began = time.perf_counter()
            model = self.bench.model(self.study, formats, lambda share, where: None)
            found = {"seconds": round(time.perf_counter() - began, 1), "unseen": self.judge.kl(model)}
            if told:
                found["own"] = self.bench.judge.kl(model)
                if self.study.known(formats) is None:
                    self.study = self.study.with_measured(formats, found["own"])
                    save_study(self.study)
            self.known[key] = found
            write_file(self.file, json.dumps(self.known, indent=1).encode())
            progress(f"{what}: {', '.join(f'{name} {value:.4f}' for name, value in found.items())}")
        return self.known[key]["unseen"]

    def number(self, fmt: LayerFormat) -> list[int]:
        """A format for all layers, as a choice."""
        return [self.study.number(fmt)]


def choose(study: Study, config: RunConfig, budget: float) -> Plan:
    """The plan for a budget in bits per weight."""
    return make_plan(study, config, skeleton(config.model), Target("bits", budget), "replace")


def measured(work: Work) -> Iterator[list[dict[str, Any]]]:
    """Measure a format for all layers and the plan for its bits, one after the other; yield the rows so far."""
    config, uniform, choices = work.bench.config, dict[LayerFormat, float](), dict[float, Choice]()
    for fmt in UNIFORM:
        one = work.unseen(work.number(fmt), format_words(fmt))
        if one is None:
            continue
        uniform[fmt] = one
        budget = work.study.bits(work.number(fmt))
        # The choice itself does not depend on the models that were measured.
        choice = choose(work.study, config, budget).first
        if work.unseen(choice.formats, f"plan for {budget:.3f} bits") is not None:
            choices[budget] = choice
            yield [_row(work, budget, choice, uniform) for budget, choice in sorted(choices.items())]
    for fmt in rivals(work.study):
        one = work.unseen(work.number(fmt), format_words(fmt), told=False)
        if one is not None:
            uniform[fmt] = one
    yield [_row(work, budget, choice, uniform) for budget, choice in sorted(choices.items())]


def rivals(study: Study) -> list[LayerFormat]:
    """The other formats for all layers that a plan can choose: of 2 bits to the greatest budget."""
    bits = {fmt: study.bits([study.number(fmt)]) for fmt in (*candidates(), *UNIFORM)}
    greatest = max(bits[fmt] for fmt in UNIFORM)
    return [fmt for fmt in candidates() if fmt not in UNIFORM and 2 <= bits[fmt] <= greatest + 1e-9]


def _row(work: Work, budget: float, choice: Choice, uniform: Mapping[LayerFormat, float]) -> dict[str, Any]:
    """A budget's plan beside the best format for all layers, and what was expected of it. ``choice``: the one layer by
    layer; the plan is one format for all layers where the check finds that better."""
    given = choose(work.study, work.bench.config, budget)
    formats = choice.formats if given.chosen.uniform is None else work.number(given.chosen.uniform)
    found, own = work.unseen(formats, ""), work.study.known(formats)
    assert found is not None
    assert own is not None
    best = min((fmt for fmt in uniform if work.study.bits(work.number(fmt)) <= budget + 1e-9), key=uniform.__getitem__)
    # What a first plan is predicted from.
    anchors = tuple(one for one in work.study.measured if one.formats in [(work.study.number(a),) for a in ANCHORS])
    fresh = work.study.model_copy(update={"measured": anchors})
    predicted = fresh.predict(fresh.cost(choice.formats))
    alone = work.unseen(choice.formats, "")
    assert alone is not None
    return {
        "budget": budget,
        "bits": choice.bits,
        "plan": found,
        "uniform": uniform[best],
        "uniform_format": format_words(best),
        "formats": sum(work.study.bits(work.number(fmt)) <= budget + 1e-9 for fmt in uniform),
        "ratio": found / uniform[best],
        "expected": own,
        "error": found / own - 1,
        "by_layer": alone,
        "predicted": predicted,
        "prediction_error": alone / predicted - 1,
        "fell_back": given.rejected is not None,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    heads = [
        "budget",
        "plan, KL",
        "best format for all (of)",
        "KL",
        "plan / format",
        "measured before",
        "error",
        "predicted (error)",
    ]
    lines = [
        [
            f"{row['budget']:.3f}",
            f"{row['plan']:.4f}",
            f"{row['uniform_format']} ({row['formats']})",
            f"{row['uniform']:.4f}",
            f"{row['ratio']:.3f}",
            f"{row['expected']:.4f}",
            f"{row['error']:+.1%}",
            f"{row['predicted']:.4f} ({row['prediction_error']:+.1%})",
        ]
        for row in rows
    ]
    return markdown.table(heads, lines)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("work", type=Path, help="a folder that keeps what is measured")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="wikitext2", help="the text of the plans; its train part is read")
    parser.add_argument("--text", default="wikitext-2-raw/wiki.valid.raw", help="the unseen text, a file")
    parser.add_argument("--windows", type=count, default=8, help="of the unseen text, as long as those of the plans")
    parser.add_argument("--stored", action="store_true", help="measure nothing, show what WORK has")
    options = parser.parse_args()
    if options.text == "wikitext2":
        raise ConfigError("--text wikitext2 is the test split, which nothing is chosen on; give another file")
    bench = Bench.open(make_config("quick", {"model": options.model, "corpus": options.corpus}))
    length = bench.judged.shape[1]
    tokenizer = load_tokenizer(options.model)
    windows = evaluation_tokens(options.text, tokenizer, seq_len=length, limit=options.windows)
    rows: list[dict[str, Any]] = []
    for rows in measured(Work(bench, windows, options.work, stored=options.stored)):
        if options.out:
            write_report(options.out, "plan", settings_of(options, "work"), rows)
    print(
        f"{options.corpus}, judged on {options.text}, {windows.numel():,} tokens, {torch.get_num_threads()} threads\n"
    )
    print(table(rows))


if __name__ == "__main__":
    main()
