"""Two small components: a finished answer with the word marked at which it differs, and the lens over a text.

    answer_view("The sky ...", at=8, key="left")
    lens_view(lens, names=("teacher", "student"), key="lens")

Both write what models wrote as text nodes, never as HTML.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from lbllm.chat.lens import Lens, step_labels

_HERE = Path(__file__).parent
_CSS = (_HERE / "style.css").read_text()
_answer = st.components.v2.component("lbllm.answer", css=_CSS, js=(_HERE / "answer.js").read_text())
_lens = st.components.v2.component("lbllm.lens", css=_CSS, js=(_HERE / "lens.js").read_text())


def answer_view(text: str | None, *, at: int | None, key: str) -> None:
    """Show an answer, the word at position ``at`` marked; None keeps the place for one."""
    _answer(key=key, data={"text": text or "", "at": None if at is None else _utf16(text or "", at)})


def lens_view(lens: Lens, *, names: tuple[str, str], key: str) -> None:
    """Show a lens with its legend. It opens at the token with the largest divergence."""
    known = [-1.0 if token.kl is None else token.kl for token in lens.tokens]
    data = {
        "names": names,
        "label": "Tokens of the text; arrow keys move from one to the next",
        "parted": "another token is the most likely one",
        "legend": [(f"k{step}", label) for step, label in enumerate(step_labels())],
        "start": known.index(max(known)),
        "tokens": [
            {
                "text": token.text,
                "kl": token.kl,
                "step": token.step,
                "agreed": token.agreed,
                "teacher": [(candidate.text, candidate.probability) for candidate in token.teacher],
                "student": [(candidate.text, candidate.probability) for candidate in token.student],
                "p": token.teacher_probability,
                "q": token.student_probability,
            }
            for token in lens.tokens
        ],
    }
    _lens(key=key, data=data)


def _utf16(text: str, position: int) -> int:
    """A position in the text as JavaScript counts it."""
    return len(text[:position].encode("utf-16-le", "surrogatepass")) // 2
