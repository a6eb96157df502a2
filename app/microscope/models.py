"""The checkpoint and its teacher: their pickers, their files as a microscope, and both models loaded as a pair.

A link only chooses. Files of this machine's own runs and of what comes with the program are read at once; others after
a click, since a name may mean a download. A model is loaded only after a click, by ``load_button``.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from app import visits
from app.compare.models import Offer, allow, allowed, choices, hold, resolve
from app.components.shown import with_index
from app.microscope import state
from app.paths import teacher_name
from app.view import plain, sentence
from lbllm.chat.pool import Slot
from lbllm.checkpoints.find import find_checkpoint
from lbllm.errors import CheckpointError, ModelError
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.pair import Pair
from lbllm.models.catalogue import MODELS

TEACHER, OWN = "Beside its teacher", "The one it was made from"
_SLOTS = "inspect_slots"


def pick_model() -> None:
    """The picker of the checkpoint."""
    offered, chosen = _checkpoints(), state.value("model")
    names = list(dict.fromkeys([*offered, chosen]))
    st.selectbox(
        "Checkpoint",
        names,
        **with_index(state.bound("model", chosen), names),
        format_func=lambda value: offered[value].title if value in offered else str(value),
        accept_new_options=True,
        on_change=_picked,
        args=("model",),
        help="A packed checkpoint: choose one, or type a run's id or a folder.",
    )


def pick_teacher() -> None:
    """The picker of the teacher."""
    chosen = state.value("teacher")
    known = list(dict.fromkeys(["", *(entry.id for entry in MODELS), chosen]))
    st.selectbox(
        TEACHER,
        known,
        **with_index(state.bound("teacher", chosen), known),
        format_func=lambda value: value or OWN,
        accept_new_options=True,
        on_change=_picked,
        args=("teacher",),
        help="The full-precision model. Only the one that the checkpoint was made from fits; choose it here where the "
        "checkpoint does not name it, or type a folder, a .gguf file or a hub id.",
    )


def chosen() -> tuple[str, str | None]:
    """The names of the checkpoint and of the teacher for the engine; None for the teacher that the checkpoint names.

    Raises LbllmError for a name that leads nowhere, ConfigError for a path outside the allowed folder.
    """
    teacher = state.value("teacher")
    return resolve(state.value("model"), _checkpoints()).name, teacher_name(teacher) if teacher else None


def _checkpoints() -> dict[str, Offer]:
    teachers = {entry.id for entry in MODELS}
    return {value: offer for value, offer in choices(running=False).items() if value not in teachers}


def _picked(name: str) -> None:
    allow(str(st.session_state[f"inspect_{name}"] or ""))
    state.taken(name)


def unread() -> list[str]:
    """What only a link chose and what is not this machine's own: it is read after a click."""
    own = _checkpoints()
    values = {name: state.value(name) for name in ("model", "teacher")}
    return [
        value
        for name, value in values.items()
        if value and not (name == "model" and value in own) and not allowed(name, value)
    ]


def ask_to_read(values: list[str]) -> None:
    """Say that a link chose models, and let the user open them."""
    names = " and ".join(f"**{plain(value)}**" for value in values)
    st.info(f"The link that opened this page chose {names}. Nothing is read until you say so.")
    st.button("Open these models", type="primary", key="inspect_open", on_click=allow, args=tuple(values))


def microscope(name: str, teacher: str | None) -> Microscope:
    """The open checkpoint, which all sessions share. Raises LbllmError."""
    folder = find_checkpoint(name).folder
    try:
        stamps = tuple((file.name, file.stat().st_mtime_ns) for file in sorted(folder.glob("*.safetensors")))
    except OSError as error:
        raise CheckpointError(f"{folder} can't be read ({error}); choose another checkpoint") from None
    try:
        return _opened(name, teacher, folder, stamps)
    except ModelError as error:
        raise ModelError(str(error).replace("with --teacher", f"above, as “{TEACHER}”")) from None


@st.cache_resource(max_entries=4, show_spinner="Reading the files of the checkpoint and its teacher")
def _opened(name: str, teacher: str | None, folder: Path, stamps: tuple[tuple[str, int], ...]) -> Microscope:
    return Microscope.open(name, teacher)


def pair(scope: Microscope, name: str) -> Pair | None:
    """Both models, loaded; None as long as they are not. Shows what is needed for it: a button, or the state of
    loading."""
    names = (scope.teacher_name, name)
    if not visits.visit().models.issuperset(names):
        load_button(names)
        return None
    with st.spinner("Loading both models"):
        slots = hold(names, _SLOTS)
    if not all(slot.over for slot in slots):
        _loading(slots)
        return None
    for slot in slots:
        if slot.state == "failed":
            st.error(sentence(slot.error))
    if any(slot.state == "failed" for slot in slots):
        st.button("Try again", key="inspect_retry", on_click=_forget)
        return None
    return _paired(slots)


def load_button(names: tuple[str, str]) -> None:
    """Offer to load both models."""
    st.markdown("This part reads your sentence with both models. The rest of the page needs only their files.")
    st.button("Load both models", type="primary", key="inspect_load", on_click=allow, args=names)


def _forget() -> None:
    st.session_state.pop(_SLOTS, None)


def _paired(slots: tuple[Slot, Slot]) -> Pair:
    kept: tuple[tuple[Slot, Slot], Pair] | None = st.session_state.get("inspect_pair")
    if kept is not None and kept[0] == slots:
        return kept[1]
    found = Pair(slots[0].loaded, slots[1].loaded)
    st.session_state["inspect_pair"] = slots, found
    return found


@st.fragment(run_every=0.4)
def _loading(slots: tuple[Slot, Slot]) -> None:
    if all(slot.over for slot in slots):
        st.rerun()
    waiting = next(slot for slot in slots if not slot.over)
    st.caption(f":material/hourglass_empty: Loading {plain(Path(waiting.name).name)} for {waiting.elapsed:.0f} s")
