"""Ten everyday prompts and what models say, as it comes: ``python -m benchmarks.answers MODEL ...``.

    python -m benchmarks.answers smollm2-135m-instruct runs/mine
    python -m benchmarks.answers smollm2-135m-instruct exports/dense     a dense copy: activations are left alone

Greedy decoding with the usual repetition penalty, one turn each, no system message but the template's own. Printed as
Markdown.
"""

from __future__ import annotations

import argparse
from datetime import date

from lbllm.chat.settings import REPETITION_PENALTY
from lbllm.chat.stream import stream
from lbllm.checkpoints.find import open_model
from lbllm.errors import LbllmError

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+", help="teachers or packed checkpoints, as `lbllm chat` takes them")
    parser.add_argument("--tokens", type=int, default=96, help="of an answer at most")
    given = parser.parse_args()
    try:
        opened = [(name, *open_model(name)) for name in given.models]
    except LbllmError as error:
        raise SystemExit(str(error)) from None
    print(f"Greedy, repetition penalty {REPETITION_PENALTY}, at most {given.tokens} tokens, {date.today()}")
    for number, prompt in enumerate(PROMPTS, 1):
        print(f"\n**{number}. {prompt}**")
        for name, model, tokenizer in opened:
            pieces = stream(
                model, tokenizer, [{"role": "user", "content": prompt}], max_new_tokens=given.tokens, temperature=0
            )
            text = "".join(piece.text for piece in pieces).strip()
            print(f"\n*{name}*\n")
            print("\n".join(f"> {line}".rstrip() for line in text.splitlines()), flush=True)


if __name__ == "__main__":
    main()
