"""The small pieces of HTML that the showcase shows for a turn.

The templates escape every text. Gradio takes a piece for a template of its own, so its signs are escaped, too.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Sequence

import gradio as gr
from markupsafe import Markup

from lbllm.chat.duel import Answer
from lbllm.chat.pool import Slot
from lbllm.chat.showcase import Seen, Showcase
from lbllm.chat.votes import CHOICES, Choice
from lbllm.labels import bits_name
from lbllm.places import ASSETS
from lbllm.templates import environment
from lbllm.texts.prompts import PromptKind
from lbllm.units import against_16_bits, size

THEME = ASSETS / "theme"
EXAMPLES = 6
LETTERS = ("A", "B")
VOTES: dict[Choice, str] = dict(zip(CHOICES, ("A is better", "B is better", "Tie", "Both bad"), strict=True))
_TEMPLATES = environment(__file__)
_SYSTEM_FONTS = ("system-ui", "Segoe UI", "Roboto", "Liberation Sans", "sans-serif")


def theme() -> gr.themes.Base:
    """The project's colours for Gradio, with fonts that every system has, so that nothing is downloaded."""
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
    # White is legible on the light theme's blue alone.
    for name in ("button_primary_background_fill_dark", "button_primary_background_fill_hover_dark"):
        colours[name] = light["primaryColor"]
    # Gradio has one value for both themes; the light theme's is legible in both.
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
    """The showcase's style sheet: large type, two columns, as high as the window."""
    return (THEME / "showcase.css").read_text()


def script() -> str:
    """The page's script: the visitor's secret, the direction of the question, and what to do without a server."""
    return (THEME / "showcase.js").read_text()


def title() -> str:
    """The page's heading: the logo with its name."""
    return _html("title", logo=Markup((THEME / "logo.svg").read_text()))


def examples(kinds: Sequence[PromptKind], turn: int, *, completes: bool) -> list[str]:
    """Return at most ``EXAMPLES`` prompts, which change with ``turn``: one of each kind, or, with ``completes``,
    beginnings of texts for models without a chat template."""
    if completes:
        return list(next(kind.prompts for kind in kinds if kind.kind == "Complete")[:EXAMPLES])
    return [kind.prompts[turn % len(kind.prompts)] for kind in kinds][:EXAMPLES]


def loading_line(showcase: Showcase) -> str:
    """How long the models have been loading; empty once they are loaded."""
    waiting = [slot.elapsed for slot in showcase.slots if not slot.over]
    return f"Loading the models, {max(waiting):.0f} s so far. You can already ask." if waiting else ""


def introduction(showcase: Showcase) -> str:
    """The two models with the figures in which they differ; empty before they are loaded."""
    if not showcase.ready:
        return ""
    sides = []
    for slot, name in zip(showcase.slots, showcase.names, strict=True):
        (memory, _), (bits, label) = _weights(slot)
        sides.append((name, memory, f"{bits} {label}"))
    return _html("introduction", completes=showcase.completes, sides=sides)


def notice(text: str, *, kind: str = "") -> str:
    """A line about the state; ``kind`` "bad" is a refusal."""
    return _html("notice", text=text, kind=kind) if text else ""


def status(showcase: Showcase, seen: Seen) -> str:
    """The state of the question and the settings of the answers, a line each."""
    chosen = seen.settings
    settings = (
        f"Both answers: temperature {chosen.temperature:g}, top-p {chosen.top_p:g}, repetition penalty "
        f"{chosen.repetition_penalty:g}, at most {chosen.max_new_tokens} tokens, seed {chosen.seed}"
    )
    return _state(showcase, seen) + _html("settings", text=settings)


def _state(showcase: Showcase, seen: Seen) -> str:
    if seen.state == "waiting":
        place = "next" if seen.position == 1 else f"number {seen.position}"
        return notice(f"Your question is {place} in the line.", kind="strong")
    if seen.state == "answering":
        if not all(slot.over for slot in showcase.slots):
            return notice("The models are being loaded. Your question is next.")
        return notice("Both models are answering.")
    if any(answer.state == "failed" for answer in seen.answers):
        return notice(next(answer.error for answer in seen.answers if answer.error), kind="bad")
    stopped = "Stopped. " if any(answer.state == "stopped" for answer in seen.answers) else ""
    if seen.votable:
        return notice(f"{stopped}Which answer is better? Your vote shows which model wrote which.", kind="strong")
    if seen.choice is not None and seen.names is not None:
        return notice(_verdict(seen.choice, seen.names), kind="strong")
    return notice(stopped)


def answer(seen: Seen, side: int) -> str:
    """An answer as far as it is written, with a mark where the limit cut it off."""
    return _html("answer", answer=seen.answers[side], letter=LETTERS[side])


def heading(showcase: Showcase, seen: Seen | None, side: int) -> str:
    """The name and the format of a side's model, or its letter while these are hidden."""
    names = showcase.names if seen is None else seen.names
    slot = None if names is None else showcase.slots[0 if names[side] == showcase.names[0] else 1]
    return _html(
        "heading",
        format=slot.loaded.precision if slot is not None and slot.state == "ready" else "",
        letter=LETTERS[side] if seen is not None and seen.blind else "",
        name=names[side] if names is not None else "",
        student=names is not None and names[side] == showcase.names[1],
    )


def figures(showcase: Showcase, seen: Seen | None, side: int) -> str:
    """Return the main figures of a side's model and answer as HTML; hidden while they would reveal the model."""
    names = showcase.names if seen is None else seen.names
    if names is None:
        return _html("figures", hidden=True, figures=[])
    slot = showcase.slots[0 if names[side] == showcase.names[0] else 1]
    answer = seen.answers[side] if seen is not None else None
    shown = [*_speed(answer), *_weights(slot)] if slot.state == "ready" else []
    return _html("figures", hidden=False, figures=shown)


def tally_line(showcase: Showcase) -> str:
    """The blind votes so far."""
    return _html("tally", tally=showcase.tally(), names=showcase.names)


def _html(piece: str, **values: object) -> str:
    made = _TEMPLATES.get_template(f"{piece}.html.jinja").render(values)
    return re.sub(r"[{}$`]", lambda sign: f"&#{ord(sign[0])};", made)


def _speed(answer: Answer | None) -> list[tuple[str, str]]:
    known = answer is not None and answer.tokens_per_second
    return [(f"{answer.tokens_per_second:.1f}" if answer is not None and known else "–", "tokens/s, both at once")]


def _weights(slot: Slot) -> list[tuple[str, str]]:
    loaded = slot.loaded
    held = loaded.weight_bytes + loaded.expanded_bytes
    memory = size(held)
    bits = f"{loaded.bpw:.2f}" if loaded.packed else f"{loaded.bpw:.0f}"
    return [
        (memory, f"weights in memory, {against_16_bits(held, loaded.weights)}"),
        (bits, bits_name(packed=loaded.packed)),
    ]


def _verdict(choice: Choice, names: tuple[str, str]) -> str:
    if choice == "tie":
        return "You voted for a tie."
    if choice == "both bad":
        return "You voted that both answers are bad."
    return f"You preferred {names[0 if choice == 'left' else 1]}."
