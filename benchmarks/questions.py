"""Print questions for a corpus of conversations: one a line, varied, in an order drawn by a seed.

    python -m benchmarks.questions > questions.txt
    python -m lbllm corpora sample --questions questions.txt --temperature 0.6 --tokens 1000000 --out answers.jsonl.gz

The two lists of everyday questions in assets/ and its seeds, each topic with several of the question forms, small sums,
programming tasks, and, where LBLLM_DATA_DIR has the corpus ``chat``, the first messages of its conversations that fit
on one line. Left out is every question that contains one of the prompts that answers are judged by or that the pages
show, or shares eight words in a row with one.
"""

from __future__ import annotations

import argparse
import gzip
import json
import random
import re
from collections.abc import Iterator

from benchmarks.answers import PROMPTS, further_prompts
from benchmarks.command_line import count, one_message
from lbllm.places import ASSETS, data_dir
from lbllm.texts.prompts import example_prompts

FORMS_A_TOPIC = 8
SUMS = 600
LONGEST = 240  # characters of a question
SHARED_WORDS = 8
THINGS = ("apples", "books", "coins", "chairs", "pencils", "eggs", "tickets", "stamps", "cups", "marbles")
NAMES = ("Anna", "Ben", "Clara", "David", "Emma", "Farid", "Grace", "Hugo", "Ines", "Jonas")
TASKS = (
    "counts the vowels in a string", "checks whether a number is even", "adds up the numbers in a list",
    "returns the average of a list", "finds the smallest number in a list", "counts the words in a sentence",
    "removes duplicates from a list", "checks whether a word is a palindrome", "computes the factorial of a number",
    "converts Celsius to Fahrenheit", "prints the numbers from 1 to 10", "sorts a list of names",
    "joins a list of words with commas", "counts how often each letter appears", "returns the last item of a list",
    "checks whether a year is a leap year", "multiplies two numbers", "finds the longest word in a list",
    "reads a file and prints its lines", "returns all even numbers of a list", "swaps the keys and values of a dict",
    "prints a multiplication table", "checks whether a number is prime", "returns the squares of a list of numbers",
    "looks up a name in a dictionary", "searches a sorted list", "merges two sorted lists", "makes a string upper case",
)  # fmt: skip
FORMS_OF_TASKS = (
    "Write a Python function that {}.",
    "Show me Python code that {}.",
    "How do I write a function in Python that {}? Explain it.",
    "Write a JavaScript function that {}.",
)


def sums(rng: random.Random, number: int) -> Iterator[str]:
    """Small sums in figures and in words."""
    for _ in range(number):
        a, b = rng.randint(2, 60), rng.randint(2, 30)
        name, thing = rng.choice(NAMES), rng.choice(THINGS)
        yield rng.choice(
            (
                f"What is {a} + {b}?",
                f"What is {a + b} minus {b}?",
                f"How much is {a % 12 + 2} times {b % 12 + 2}?",
                f"What is {a * 10} divided by 10?",
                f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have now?",
                f"{name} has {a + b} {thing} and gives {b} away. How many are left?",
                f"One of my {thing} costs {b} euros. What do {a % 9 + 2} of them cost?",
                f"Which is larger, {a} or {a + b}?",
            )
        )


def talked_about() -> Iterator[str]:
    """The first messages of the conversations in LBLLM_DATA_DIR."""
    folder = data_dir()
    for path in sorted((folder / "chat").glob("*.jsonl.gz")) if folder else []:
        with gzip.open(path, "rt", encoding="utf-8") as file:
            for line in file:
                yield str(json.loads(line)["messages"][0]["content"]).strip()


def words(text: str) -> str:
    """A text as its words in lower case, with a space around each."""
    found = re.findall(r"[a-z0-9+']+", text.lower())
    return f" {' '.join(found)} "


def runs(prompt: str) -> list[str]:
    """The runs of SHARED_WORDS words of a prompt, or the whole of a shorter one."""
    found = words(prompt).split()
    number = max(1, len(found) - SHARED_WORDS + 1)
    return [f" {' '.join(found[at : at + SHARED_WORDS])} " for at in range(number)]


def judged_prompts() -> list[str]:
    """All prompts that a model is shown or judged by: none of them may be trained on."""
    return [*PROMPTS, *further_prompts(), *(prompt for kind in example_prompts() for prompt in kind.prompts)]


def questions(seed: int) -> list[str]:
    """All questions, each once, in an order drawn by ``seed``."""
    rng = random.Random(seed)
    seeds = json.loads((ASSETS / "seeds.json").read_text())
    found = [line for path in sorted(ASSETS.glob("*_questions.txt")) for line in path.read_text().splitlines()]
    found += seeds["prompts"]
    for topic in seeds["topics"]:
        found += [form.replace("{t}", topic) for form in rng.sample(seeds["questions"], FORMS_A_TOPIC)]
    found += [form.format(task) for task in TASKS for form in FORMS_OF_TASKS]
    found += sums(rng, SUMS)
    found += talked_about()
    fitting = dict.fromkeys(text for text in found if text and "\n" not in text and len(text) <= LONGEST)
    taken = [run for prompt in judged_prompts() for run in runs(prompt)]
    kept = [text for text in fitting if not any(run in words(text) for run in taken)]
    return rng.sample(kept, len(kept))


@one_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--limit", type=count, help="print at most so many")
    options = parser.parse_args()
    print("\n".join(questions(options.seed)[: options.limit]))


if __name__ == "__main__":
    main()
