"""Everyday prompts and the unedited answers of models: ``python -m benchmarks.answers MODEL ...``.

    python -m benchmarks.answers smollm2-135m-instruct runs/mine
    python -m benchmarks.answers smollm2-135m-instruct runs/mine --prompts further --out answers.json
    python -m benchmarks.answers smollm2-135m-instruct exports/dense     a dense copy: activations are not quantized

Ten prompts, or the thirty of ``prompts_further.json``, which were written down before the models that they judge were
trained. Greedy decoding with the usual repetition penalty, one turn each, no system message except the template's own.
Printed as Markdown. ``benchmarks.blind`` makes a sheet of such a file to judge the answers blind.
"""

from __future__ import annotations

import json
from datetime import date
from pathlib import Path

from benchmarks.command_line import command_parser, one_message
from benchmarks.report import settings_of, write_report
from lbllm.chat.settings import REPETITION_PENALTY
from lbllm.chat.stream import stream
from lbllm.checkpoints.find import open_model

PROMPTS = (
    "What is the capital of France?",
    "Why is the sky blue?",
    "How do I boil an egg?",
    "Give me three tips for sleeping better.",
    "I feel sad today. What can I do?",
    "Write a short poem about the sea.",
    "What should I pack for a week at the beach?",
    "Explain what a computer program is to a child.",
    "Write a polite message to a neighbour who plays loud music at night.",
    "What is a good present for my grandmother's birthday?",
)


def further_prompts() -> tuple[str, ...]:
    """The thirty further prompts, in the order of their file."""
    kinds = json.loads(Path(__file__).with_name("prompts_further.json").read_text())
    return tuple(prompt for kind in kinds for prompt in kind["prompts"])


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("models", nargs="+", help="teachers or packed checkpoints, as `lbllm chat` takes them")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    parser.add_argument("--prompts", choices=("ten", "further"), default="ten")
    given = parser.parse_args()
    opened = [(name, *open_model(name)) for name in given.models]
    rows = []
    print(f"Greedy, repetition penalty {REPETITION_PENALTY}, at most {given.tokens} tokens, {date.today()}")
    for number, prompt in enumerate(PROMPTS if given.prompts == "ten" else further_prompts(), 1):
        print(f"\n**{number}. {prompt}**")
        for name, model, tokenizer in opened:
            pieces = stream(
                model, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=given.tokens, temperature=0
            )
            text = "".join(piece.text for piece in pieces).strip()
            print(f"\n*{name}*\n")
            print("\n".join(f"> {line}".rstrip() for line in text.splitlines()), flush=True)
            rows.append({"prompt": prompt, "model": name, "answer": text})
    if given.out:
        decoding = {"repetition_penalty": REPETITION_PENALTY, "temperature": 0}
        write_report(given.out, "answers", settings_of(given) | decoding, rows)


if __name__ == "__main__":
    main()
