"""Judge the answers of models blind: a sheet without names in a shuffled order, and the marks by model.

    python -m benchmarks.answers smollm2-135m-instruct runs/mine --prompts further --out answers.json
    python -m benchmarks.blind sheet answers.json --out sheet.json
    python -m benchmarks.blind marks answers.json sheet.json --out docs/results/marks.json

``sheet`` writes each prompt with one answer, all answers of all models in an order drawn by ``--seed``, each with an
empty mark. A judge who has not seen ``answers.json`` fills in the marks by the rubric, which the sheet repeats.
``marks`` checks that each answer has its mark and prints how many answers of each model are sensible.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message
from benchmarks.report import settings_of, write_report
from lbllm.errors import LbllmError
from lbllm.files import write_file

RUBRIC = {
    "2": "sensible: it answers what was asked, what it says is right in all that matters, and it can be read; to be "
    "cut off at the limit of tokens is no fault",
    "1": "in part: on the question, with an error or a gap that a listener would notice",
    "0": "not sensible: off the question, wrong in what matters, empty, or a loop",
}


def key(row: Mapping[str, Any]) -> str:
    """What stands for the model in a sheet: it names an answer and tells nothing about who gave it."""
    return hashlib.sha256(json.dumps([row["prompt"], row["answer"], row["model"]]).encode()).hexdigest()[:12]


def sheet(rows: Sequence[Mapping[str, Any]], seed: int) -> dict[str, Any]:
    """The rubric, and prompt and answer of each row in shuffled order."""
    entries = [{"key": key(row), "prompt": row["prompt"], "answer": row["answer"], "mark": None} for row in rows]
    random.Random(seed).shuffle(entries)
    return {"rubric": RUBRIC, "answers": entries}


def marked(rows: Sequence[Mapping[str, Any]], filled: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows with their marks. Raises LbllmError naming the first answer without a mark of the rubric, or whose text
    is not that of the sheet."""
    entries = {entry["key"]: entry for entry in filled["answers"]}
    found = []
    for row in rows:
        entry = entries.get(key(row))
        if entry is None:
            raise LbllmError(f"the sheet has no answer {key(row)} to {row['prompt']!r}: it is of other answers")
        if str(entry["mark"]) not in RUBRIC:
            raise LbllmError(f"answer {key(row)} to {row['prompt']!r}: its mark is {entry['mark']!r}, give 0, 1 or 2")
        found.append({**row, "mark": int(entry["mark"])})
    return found


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """For each model how many answers got which mark, as a Markdown table."""
    lines = []
    for model in dict.fromkeys(row["model"] for row in rows):
        marks = [row["mark"] for row in rows if row["model"] == model]
        lines.append([model, *(f"{marks.count(int(mark))} of {len(marks)}" for mark in RUBRIC)])
    return markdown.table(["", *(text.partition(":")[0] for text in RUBRIC.values())], lines)


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("step", choices=("sheet", "marks"))
    parser.add_argument("answers", type=Path, help="what benchmarks.answers wrote with --out")
    parser.add_argument("sheet", type=Path, nargs="?", help="the filled sheet, for the step marks")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = json.loads(options.answers.read_bytes())["rows"]
    if options.step == "sheet":
        if options.out is None:
            parser.error("--out: name the sheet's file")
        write_file(options.out, json.dumps(sheet(rows, options.seed), indent=1, ensure_ascii=False).encode())
        return
    if options.sheet is None:
        parser.error("name the filled sheet")
    judged = marked(rows, json.loads(options.sheet.read_bytes()))
    print(table(judged))
    if options.out:
        write_report(options.out, "blind", settings_of(options), judged)


if __name__ == "__main__":
    main()
