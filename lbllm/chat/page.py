"""Write a comparison as one HTML file to share: prompts, answers, figures, vote and lens, for a light or dark screen.

The file loads nothing and runs no script. Its template escapes every text of a person or a model, and a content
security policy blocks what escaping might miss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from lbllm.chat.conversation import Exchange
from lbllm.chat.duel import Answer
from lbllm.chat.lens import Lens, first_difference, step_labels
from lbllm.chat.settings import ChatSettings
from lbllm.chat.votes import Choice
from lbllm.labels import bits_name
from lbllm.templates import environment

_TEMPLATES = environment(__file__)
# Characters and lines up to which a prompt is shown as a whole.
LONG_PROMPT = (600, 8)
_VERDICTS: dict[Choice, str] = {
    "left": "The left answer is better",
    "right": "The right answer is better",
    "tie": "A tie",
    "both bad": "Both are bad",
}


@dataclass(frozen=True)
class _Side:
    """An answer as the page shows it. Its text is ``before``, ``marked`` and ``after``: ``marked`` is the first
    word in which the answers differ, if they do. ``missing``: shown if there is no text."""

    name: str
    before: str
    marked: str
    after: str
    missing: str
    figures: list[tuple[str, str]]
    settings: ChatSettings
    completes: bool
    cut: int


@dataclass(frozen=True)
class _Shown:
    prompt: str
    left: _Side
    right: _Side
    verdict: str | None
    lens: Lens | None
    lens_names: tuple[str, str]

    @property
    def beginning(self) -> str:
        """The beginning of a long prompt, shown while the rest is folded; empty if the prompt is short."""
        return folded(self.prompt)


def comparison_page(
    exchanges: Sequence[Exchange],
    *,
    votes: dict[str, Choice] | None = None,
) -> str:
    """The page as text, to save in UTF-8, with the lens that each exchange has. ``votes`` by exchange id."""
    return _TEMPLATES.get_template("comparison.html.jinja").render(
        names=" and ".join(dict.fromkeys(name for exchange in exchanges[-1:] for name in exchange.names)),
        when=time.strftime("%Y-%m-%d %H:%M", time.localtime(exchanges[-1].time if exchanges else time.time())),
        exchanges=[_shown(exchange, (votes or {}).get(exchange.id)) for exchange in exchanges],
        step_labels=step_labels(),
    )


def _shown(exchange: Exchange, choice: Choice | None) -> _Shown:
    left, right = exchange.answers
    at = first_difference(left.text, right.text) if left.text and right.text else None
    verdict = _VERDICTS[choice] if choice else None
    lens, names = exchange.lens if exchange.lens is not None else (None, exchange.names)
    return _Shown(exchange.prompt, _side(exchange, 0, at), _side(exchange, 1, at), verdict, lens, names)


def folded(prompt: str) -> str:
    """Return the beginning of a prompt that is too long to be shown as a whole at first, else nothing."""
    lines = prompt.splitlines()
    if len(prompt) <= LONG_PROMPT[0] and len(lines) <= LONG_PROMPT[1]:
        return ""
    return "\n".join(lines[:3])[:200].rstrip() + " …"


def _side(exchange: Exchange, side: int, at: int | None) -> _Side:
    answer = exchange.answers[side]
    before, marked, after = _parts(answer.text, at)
    return _Side(
        name=exchange.names[side],
        before=before,
        marked=marked,
        after=after,
        missing="" if answer.text else answer.error or "No text.",
        figures=_figures(answer),
        settings=exchange.settings[side],
        completes=answer.completes,
        cut=answer.cut if answer.state == "done" else 0,
    )


def _parts(text: str, at: int | None) -> tuple[str, str, str]:
    """The text before the first word that differs (it begins at ``at``), that word, and the text after it. Where this
    text ends and the other one continues, the word is a sign for the end."""
    if at is None:
        return text, "", ""
    rest = text[at:]
    space = len(rest) - len(rest.lstrip())
    words = rest.split(maxsplit=1)
    end = at + space + (len(words[0]) if words else 0)
    return text[:at], text[at:end] or "∎", text[end:]


def _figures(answer: Answer) -> list[tuple[str, str]]:
    if not answer.tokens:
        return []
    return [
        (f"{answer.tokens_per_second:.1f}", "tokens/s, alone" if answer.timed else "tokens/s"),
        (f"{answer.first_token_seconds:.2f} s", "first token"),
        (f"{answer.weight_bytes / 1e6:.1f} MB", "weights"),
        (f"{answer.bpw:.2f}", bits_name(packed=answer.packed)),
    ]
