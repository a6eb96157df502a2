"""Three small components: a finished answer with its first different word marked, tabs for two answers on a narrow
screen, and the lens over a text.

    answer_view("The sky ...", at=8, key="left")
    tabs_view(("teacher", "student"), key="tabs")
    lens_view(lens, names=("teacher", "student"), key="lens")

All show the text of models as text nodes, never as HTML.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import streamlit as st

from app.components import TOKENS
from lbllm.chat.lens import Lens, step_labels

_HERE = Path(__file__).parent
_CSS = (_HERE / "style.css").read_text()
_answer = st.components.v2.component("lbllm.answer", css=_CSS, js=(_HERE / "answer.js").read_text())
_tabs = st.components.v2.component("lbllm.tabs", css=_CSS, js=(_HERE / "tabs.js").read_text())
_lens = st.components.v2.component("lbllm.lens", css=_CSS, js=TOKENS + (_HERE / "lens.js").read_text())


def answer_view(text: str | None, *, at: int | None, key: str) -> None:
    """Show an answer with the word at position ``at`` marked; for None, show an empty element as a placeholder."""
    _answer(key=key, data={"text": text or "", "at": None if at is None else _utf16(text or "", at)})


def tabs_view(names: tuple[str, str], *, key: str) -> None:
    """Show two tabs, one for each answer. The style sheet of the workbench hides them on a wide screen."""
    _tabs(key=key, data={"names": list(names)})


def lens_view(lens: Lens, *, names: tuple[str, str], key: str, go: Callable[[str, str], None] | None = None) -> None:
    """Show a lens with its legend. It opens at the token with the largest divergence.

    With ``go`` the expected tokens are buttons: it gets the text before the token and the text that was chosen in the
    token's place, before the page runs again.
    """
    known = [-1.0 if token.kl is None else token.kl for token in lens.tokens]
    data = {
        "names": names,
        "label": "Tokens of the text; use the arrow keys to move between them",
        "parted": "the models' most likely tokens differ",
        "legend": [(f"k{step}", label) for step, label in enumerate(step_labels())],
        "start": known.index(max(known)),
        "go": go is not None,
        "tokens": [
            {
                "text": token.text,
                "kl": token.kl,
                "step": token.step,
                "agreed": token.agreed,
                "teacher": [(one.text, one.probability, one.special) for one in token.teacher],
                "student": [(one.text, one.probability, one.special) for one in token.student],
                "p": token.teacher_probability,
                "q": token.student_probability,
            }
            for token in lens.tokens
        ],
    }

    def chosen() -> None:
        sent = st.session_state[key].get("go")
        if sent is not None and go is not None:
            number, side, rank = sent
            token = lens.tokens[number]
            go(lens.begun(number, ""), (token.teacher, token.student)[side][rank].text)

    _lens(key=key, data=data, on_go_change=chosen)


def _utf16(text: str, position: int) -> int:
    """Return a position in the text in JavaScript's units (UTF-16)."""
    return len(text[:position].encode("utf-16-le", "surrogatepass")) // 2
