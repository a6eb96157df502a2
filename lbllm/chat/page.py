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


@dataclass(frozen=True)
class _Shown:
    prompt: str
    left: _Side
    right: _Side
    verdict: str | None


def comparison_page(
    exchanges: Sequence[Exchange],
    *,
    votes: dict[str, Choice] | None = None,
    lens: tuple[Lens, tuple[str, str]] | None = None,
) -> str:
    """The page as text, to save in UTF-8. ``votes`` by exchange id; ``lens``: the lens over the last exchange, with
    the names of teacher and student."""
    shown, lens_names = lens if lens is not None else (None, None)
    return _TEMPLATES.get_template("comparison.html.jinja").render(
        names=" and ".join(dict.fromkeys(name for exchange in exchanges[-1:] for name in exchange.names)),
        when=time.strftime("%Y-%m-%d %H:%M", time.localtime(exchanges[-1].time if exchanges else time.time())),
        exchanges=[_shown(exchange, (votes or {}).get(exchange.id)) for exchange in exchanges],
        lens=shown,
        lens_names=lens_names,
        step_labels=step_labels(),
    )


def _shown(exchange: Exchange, choice: Choice | None) -> _Shown:
    left, right = exchange.answers
    at = first_difference(left.text, right.text) if left.text and right.text else None
    verdict = _VERDICTS[choice] if choice else None
    return _Shown(exchange.prompt, _side(exchange, 0, at), _side(exchange, 1, at), verdict)


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
