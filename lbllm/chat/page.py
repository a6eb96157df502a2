"""A comparison as one HTML file to share: prompts, answers, figures, the vote, the lens; readable in both themes.

The file loads nothing and runs no script. Every string that a person or a model wrote is escaped, and a content
security policy forbids what escaping might miss.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from html import escape

from lbllm.chat.conversation import Exchange
from lbllm.chat.duel import Answer
from lbllm.chat.lens import Candidate, Lens, LensToken, first_difference, step_labels
from lbllm.chat.votes import Choice

_VERDICTS: dict[Choice, str] = {
    "left": "The left answer is better",
    "right": "The right answer is better",
    "tie": "A tie",
    "both bad": "Both are bad",
}
_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b2733; --soft: #f3f5f7; --line: #dce2e8; --lead: #0069a6; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #12171d; --ink: #e4e9ee; --soft: #1c232b; --line: #323c47; --lead: #6cbce8; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 2rem 1.5rem 12rem; background: var(--paper); color: var(--ink);
  font: 16px/1.6 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .4rem; }
.small { font-size: .85rem; opacity: .75; }
.prompt { background: var(--soft); border-radius: .5rem; padding: .7rem 1rem; margin: 2rem 0 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 1rem; }
.answer { border: 1px solid var(--line); border-radius: .5rem; padding: .9rem 1rem; }
.answer h3 { font-size: 1rem; margin: 0 0 .5rem; overflow-wrap: anywhere; }
.words { white-space: pre-wrap; overflow-wrap: anywhere; }
mark { color: inherit; background: rgba(230, 159, 0, .32); border-bottom: 2px solid #e69f00; }
.figures { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin-top: .7rem; }
.figures b { display: block; font-size: 1.25rem; font-variant-numeric: tabular-nums; }
.vote { color: var(--lead); font-weight: 600; margin: 1rem 0; }
.lens { line-height: 2; }
.token { position: relative; border-radius: 2px; padding: .12em 0; }
.token:hover, .token:focus { outline: 2px solid var(--lead); }
.parted { text-decoration: underline dotted 2px; text-underline-offset: .25em; }
.k1 { background: rgba(213,94,0,.13); } .k2 { background: rgba(213,94,0,.26); } .k3 { background: rgba(213,94,0,.42); }
.k4 { background: rgba(213,94,0,.58); } .k5 { background: rgba(213,94,0,.78); }
.card { display: none; position: fixed; left: 0; right: 0; bottom: 0; z-index: 2; background: var(--soft);
  border-top: 1px solid var(--line); padding: .7rem 1.5rem; font: .85rem/1.5 system-ui, sans-serif; gap: 2.5rem;
  justify-content: center; white-space: normal; }
.token:hover .card, .token:focus .card { display: flex; }
.token:hover .card { z-index: 3; }
.card code { white-space: pre; }
.card span span { display: block; }
.legend { opacity: 1; }
.legend span { display: inline-block; margin-right: 1.1rem; }
.legend i { display: inline-block; width: 1.5em; height: 1em; border: 1px solid var(--line); margin-right: .4em;
  vertical-align: -.12em; }
"""


def comparison_page(
    exchanges: Sequence[Exchange],
    *,
    votes: dict[str, Choice] | None = None,
    lens: tuple[Lens, tuple[str, str]] | None = None,
) -> str:
    """The page, as text to be saved in UTF-8. ``votes`` by exchange id; ``lens``: one over the last exchange,
    with the teacher's and the student's name."""
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(exchanges[-1].time if exchanges else time.time()))
    names = " and ".join(dict.fromkeys(name for exchange in exchanges[-1:] for name in exchange.names))
    parts = [
        f"<h1>{escape(names or 'Comparison')}</h1>",
        f'<p class="small">Two models, the same prompts. Made with LBLLM Workbench, {escape(when)}.</p>',
        *(_exchange(exchange, (votes or {}).get(exchange.id)) for exchange in exchanges),
    ]
    if lens is not None:
        parts.append(_lens(*lens))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">\n"
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(names or 'Comparison')}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _exchange(exchange: Exchange, choice: Choice | None) -> str:
    left, right = exchange.answers
    at = first_difference(left.text, right.text) if left.text and right.text else None
    answers = "".join(_answer(exchange, side, at) for side in (0, 1))
    verdict = f'<p class="vote">{escape(_VERDICTS[choice])}</p>' if choice else ""
    prompt = f'<div class="prompt words">{escape(exchange.prompt)}</div>'
    return f'<section>{prompt}<div class="pair">{answers}</div>{verdict}</section>'


def _answer(exchange: Exchange, side: int, at: int | None) -> str:
    answer, settings = exchange.answers[side], exchange.settings[side]
    stated = (
        f"temperature {settings.temperature:g}, top-p {settings.top_p:g}, "
        f"repetition penalty {settings.repetition_penalty:g}, seed {settings.seed}"
    )
    if settings.system and not answer.completes:
        stated += f", system prompt: {settings.system}"
    if answer.completes:
        stated += "; goes on with the text, no chat template"
    body = _marked(answer.text, at) if answer.text else f"<i>{escape(answer.error or 'No text.')}</i>"
    return (
        f'<div class="answer"><h3>{escape(exchange.names[side])}</h3><div class="words">{body}</div>'
        f'{_figures(answer)}<div class="small">{escape(stated)}</div></div>'
    )


def _marked(text: str, at: int | None) -> str:
    if at is None:
        return escape(text)
    rest = text[at:]
    space = len(rest) - len(rest.lstrip())
    words = rest.split(maxsplit=1)
    end = at + space + (len(words[0]) if words else 0)
    word = escape(text[at:end]) or "∎"
    return f'{escape(text[:at])}<mark title="Here the answers part">{word}</mark>{escape(text[end:])}'


def _figures(answer: Answer) -> str:
    if not answer.tokens:
        return ""
    figures = [
        (f"{answer.tokens_per_second:.1f}", "tokens/s, alone" if answer.timed else "tokens/s"),
        (f"{answer.first_token_seconds:.2f} s", "first token"),
        (f"{answer.weight_bytes / 1e6:.1f} MB", "weights"),
        (f"{answer.bpw:.2f}", "bits a weight"),
    ]
    cells = "".join(f'<span class="small"><b>{escape(value)}</b>{escape(label)}</span>' for value, label in figures)
    return f'<div class="figures">{cells}</div>'


def _lens(lens: Lens, names: tuple[str, str]) -> str:
    legend = "".join(f'<span><i class="k{step}"></i>{text}</span>' for step, text in enumerate(step_labels()))
    tokens = "".join(_token(token, names) for token in lens.tokens)
    return (
        "<section><h2>Lens: where the models expect different words</h2>"
        f'<p class="small">Colour: KL({escape(names[0])} ‖ {escape(names[1])}) in nats. Dotted line: the most likely '
        "token differs. Point at a token, or go there with the Tab key, to see what both expected.</p>"
        f'<p class="small legend">{legend}</p><p class="words lens">{tokens}</p></section>'
    )


def _token(token: LensToken, names: tuple[str, str]) -> str:
    if token.kl is None:
        return f'<span class="token">{escape(token.text)}</span>'
    own = f"KL {token.kl:.3f} nats"
    sides = zip(names, (token.teacher, token.student), strict=True)
    cards = "".join(f"<span><span><b>{escape(name)}</b></span>{_candidates(listed)}</span>" for name, listed in sides)
    parted = "" if token.agreed else " parted"
    return (
        f'<span class="token k{token.step}{parted}" tabindex="0">{escape(token.text)}'
        f'<span class="card"><span><span><b><code>{_shape(token.text)}</code></b></span><span>{own}</span></span>'
        f"{cards}</span></span>"
    )


def _candidates(candidates: Sequence[Candidate]) -> str:
    return "".join(
        f"<span><code>{_shape(candidate.text)}</code> {100 * candidate.probability:.1f} %</span>"
        for candidate in candidates
    )


def _shape(text: str) -> str:
    """A token with its spaces and line ends made visible."""
    return escape(text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥"))
