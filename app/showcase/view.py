"""Draw a turn of the showcase as small pieces of HTML.

They contain no text of visitors or models, which text boxes show; all other text is escaped.
"""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from html import escape

import gradio as gr

from lbllm.chat.duel import Answer
from lbllm.chat.pool import Slot
from lbllm.chat.showcase import Seen, Showcase
from lbllm.chat.votes import CHOICES, Choice
from lbllm.places import ASSETS
from lbllm.texts.prompts import PromptKind
from lbllm.units import size

THEME = ASSETS / "theme"
EXAMPLES = 6
LETTERS = ("A", "B")
VOTES: dict[Choice, str] = dict(zip(CHOICES, ("A is better", "B is better", "Tie", "Both bad"), strict=True))
_SYSTEM_FONTS = ("system-ui", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")


def theme() -> gr.themes.Base:
    """Return the project's colours for Gradio, with system fonts, so that no font is downloaded."""
    settings = tomllib.loads((THEME / "theme.toml").read_text())["theme"]
    light, dark = settings["light"], settings["dark"]
    roles = {
        "backgroundColor": "body_background_fill background_fill_primary block_background_fill input_background_fill",
        "secondaryBackgroundColor": "background_fill_secondary button_secondary_background_fill",
        "textColor": "body_text_color button_secondary_text_color block_label_text_color block_title_text_color "
        "checkbox_label_text_color",
        "borderColor": "border_color_primary block_border_color input_border_color checkbox_border_color "
        "button_secondary_border_color",
        "primaryColor": "button_primary_background_fill button_primary_background_fill_hover color_accent "
        "checkbox_background_color_selected checkbox_border_color_selected border_color_accent "
        "input_border_color_focus checkbox_border_color_focus loader_color button_secondary_border_color_hover",
        "linkColor": "link_text_color link_text_color_hover link_text_color_active link_text_color_visited",
    }
    colours: dict[str, str] = {"button_primary_text_color": "white", "button_primary_text_color_dark": "white"}
    for role, names in roles.items():
        for name in names.split():
            colours |= {name: light[role], f"{name}_dark": dark[role]}
    # Gradio has one accent colour for both themes; that of the light theme is legible on both.
    del colours["color_accent_dark"]
    colours |= {
        "button_secondary_background_fill_hover": light["secondaryBackgroundColor"],
        "button_secondary_background_fill_hover_dark": dark["secondaryBackgroundColor"],
        "block_shadow": "none",
        "block_label_background_fill": "transparent",
        "block_label_background_fill_dark": "transparent",
    }
    radius = settings["baseRadius"]
    colours |= {"block_radius": radius, "input_radius": radius, "button_large_radius": radius}
    return gr.themes.Base(font=_SYSTEM_FONTS, font_mono=("ui-monospace", "Consolas", "monospace")).set(**colours)


def css() -> str:
    """Return the showcase's style sheet: large type, two columns, as high as the window."""
    return (THEME / "showcase.css").read_text()


def logo() -> str:
    """Return the logo as SVG."""
    return (THEME / "logo.svg").read_text()


def examples(kinds: Sequence[PromptKind], turn: int, *, completes: bool) -> list[str]:
    """Return at most ``EXAMPLES`` prompts, one of each kind; each ``turn`` gives other prompts.

    With ``completes``, for models without a chat template, they are the prompts that begin a text.
    """
    if completes:
        return list(next(kind.prompts for kind in kinds if kind.kind == "Complete")[:EXAMPLES])
    return [kind.prompts[turn % len(kind.prompts)] for kind in kinds][:EXAMPLES]


def loading_line(showcase: Showcase) -> str:
    """Return a line on how long the models have been loading, or "" when they are loaded."""
    waiting = [slot.elapsed for slot in showcase.slots if not slot.over]
    return f"Loading the models, {max(waiting):.0f} s so far. You can already ask." if waiting else ""


def introduction(showcase: Showcase) -> str:
    """Return HTML on the two models, with memory and bits per weight; "" before they are loaded."""
    if not showcase.ready:
        return ""
    sides = []
    for slot, name in zip(showcase.slots, showcase.names, strict=True):
        (memory, _), (bits, label) = _weights(slot)
        sides.append(f"<li><b>{escape(name)}</b><span>{escape(f'{memory} in memory, {bits} {label}')}</span></li>")
    answering = "continue your text" if showcase.completes else "answer your question"
    return f'<div class="introduction"><p>Two models {answering} at the same time:</p><ul>{"".join(sides)}</ul></div>'


def notice(text: str, *, kind: str = "") -> str:
    """Return a status line as HTML; ``kind`` "bad" is for errors and refusals."""
    return f'<p class="notice {kind}" role="status">{escape(text)}</p>' if text else ""


def status(showcase: Showcase, seen: Seen) -> str:
    """Return a line of HTML with the present state of a question."""
    if seen.state == "waiting":
        place = "next" if seen.position == 1 else f"number {seen.position}"
        return notice(f"Your question is {place} in the line.", kind="strong")
    if seen.state == "answering":
        if not all(slot.over for slot in showcase.slots):
            return notice("The models are loading. Your question is next.")
        return notice("Both models are answering.")
    if any(answer.state == "failed" for answer in seen.answers):
        return notice(next(answer.error for answer in seen.answers if answer.error), kind="bad")
    stopped = "Stopped. " if any(answer.state == "stopped" for answer in seen.answers) else ""
    if seen.votable:
        return notice(f"{stopped}Which answer is better? Your vote shows which model wrote which.", kind="strong")
    if seen.choice is not None and seen.names is not None:
        return notice(_verdict(seen.choice, seen.names), kind="strong")
    return notice(stopped)


def heading(showcase: Showcase, seen: Seen | None, side: int) -> str:
    """Return the heading of a side: the model's name, and in a blind turn a letter; the name is hidden until the
    vote."""
    letter = f"<b>{LETTERS[side]}</b>" if seen is not None and seen.blind else ""
    names = showcase.names if seen is None else seen.names
    name = f"<span>{escape(names[side])}</span>" if names is not None else ""
    student = ' class="student"' if names is not None and names[side] == showcase.names[1] else ""
    return f"<h2{student}>{letter}{name}</h2>"


def figures(showcase: Showcase, seen: Seen | None, side: int) -> str:
    """Return the figures of a side's model and answer as HTML; in a blind turn they are hidden until the vote."""
    names = showcase.names if seen is None else seen.names
    if names is None:
        return '<div class="figures"><p>The figures are shown after your vote.</p></div>'
    slot = showcase.slots[0 if names[side] == showcase.names[0] else 1]
    if slot.state != "ready":
        return '<div class="figures"></div>'
    cells = "".join(
        f"<div><b>{escape(value)}</b><span>{escape(label)}</span></div>"
        for value, label in (*_speed(seen.answers[side] if seen is not None else None), *_weights(slot))
    )
    return f'<div class="figures">{cells}</div>'


def tally_line(showcase: Showcase) -> str:
    """Return the numbers of blind votes so far as HTML."""
    counted = showcase.tally()
    if not counted.total:
        return '<p class="tally">No blind votes yet</p>'
    votes = "1 blind vote" if counted.total == 1 else f"{counted.total} blind votes"
    first, second = (escape(name) for name in showcase.names)
    cells = f"<span>{first} <b>{counted.left}</b></span><span>{second} <b>{counted.right}</b></span>"
    cells += f"<span>tie <b>{counted.tie}</b></span><span>both bad <b>{counted.both_bad}</b></span>"
    return f'<p class="tally"><span>{votes}:</span>{cells}</p>'


def _speed(answer: Answer | None) -> list[tuple[str, str]]:
    known = answer is not None and answer.tokens_per_second
    return [(f"{answer.tokens_per_second:.1f}" if answer is not None and known else "–", "tokens/s, both at once")]


def _weights(slot: Slot) -> list[tuple[str, str]]:
    loaded = slot.loaded
    memory = size(loaded.weight_bytes + loaded.expanded_bytes)
    bits = f"{loaded.bpw:.2f}" if loaded.packed else f"{loaded.bpw:.0f}"
    return [
        (memory, "weights in memory"),
        (bits, "bits per weight in its blocks" if loaded.packed else "bits per weight"),
    ]


def _verdict(choice: Choice, names: tuple[str, str]) -> str:
    if choice == "tie":
        return "You voted for a tie."
    if choice == "both bad":
        return "You voted that both answers are bad."
    return f"You preferred {names[0 if choice == 'left' else 1]}."
