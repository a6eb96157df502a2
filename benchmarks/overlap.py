"""Whether a training text contains passages of an evaluation text: ``python -m benchmarks.overlap CORPUS``.

    python -m benchmarks.overlap embedded+wikipedia
    python -m benchmarks.overlap notes.jsonl --text wikitext2 --words 8

It counts the places of the evaluation text where a run of words begins that is also in the corpus' train part; case,
punctuation and WikiText's marks between characters are ignored. Thirteen words is the length that GPT-3's authors
used (Brown et al. 2020).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from benchmarks.command_line import command_parser, count, one_message
from benchmarks.report import settings_of, write_report
from lbllm.config import DEFAULT_MODEL
from lbllm.models.teacher import load_tokenizer
from lbllm.texts.corpus import load_corpus
from lbllm.texts.windows import evaluation_tokens

EVERYTHING = 1_000_000_000  # tokens
SEQUENCE = 512


def words(text: str) -> list[str]:
    """The runs of letters and digits of a text, in lower case."""
    return re.findall(r"[^\W_]+", text.lower())


def shared(trained: str, judged: str, length: int) -> tuple[int, int]:
    """How many places of the evaluation text begin ``length`` words that are also in the training text, and the number
    of all places."""
    known = set(_runs(words(trained), length))
    runs = list(_runs(words(judged), length))
    return sum(run in known for run in runs), len(runs)


def _runs(found: list[str], length: int) -> Iterator[int]:
    return (hash(tuple(found[start : start + length])) for start in range(len(found) - length + 1))


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("corpus", help="as `quantize --corpus` takes it")
    parser.add_argument("--text", default="wikitext2", help="to be judged on: wikitext2 or a file")
    parser.add_argument("--words", type=count, default=13)
    parser.add_argument("--model", default=DEFAULT_MODEL, help="whose tokenizer reads both")
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model)
    trained = load_corpus(given.corpus, tokenizer, seq_len=SEQUENCE, tokens=EVERYTHING)
    judged = evaluation_tokens(given.text, tokenizer, seq_len=SEQUENCE)
    text, other = (str(tokenizer.decode(tokens.flatten())) for tokens in (trained.sequences, judged))
    found, places = shared(text, other, given.words)
    print(f"{given.corpus}, {trained.tokens:,} tokens to train on")
    print(f"{found:,} of the {places:,} runs of {given.words} words of {given.text} stand in it")
    if given.out:
        row = {"label": given.corpus, "tokens": trained.tokens, "runs": places, "found": found}
        write_report(given.out, "overlap", settings_of(given), [row])


if __name__ == "__main__":
    main()
