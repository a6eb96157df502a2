"""The two model pickers of the compare page: what can be picked, what a pick means, how far its loading is."""

from __future__ import annotations

from typing import NamedTuple

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app.paths import model_name
from app.view import checkpoints, plain, sentence, size_text, store
from lbllm.chat.pool import ModelPool, Slot
from lbllm.config import DEFAULT_MODEL, SHIPPED
from lbllm.models.catalogue import EMBEDDED_PRECISION, MODELS

SIDES = ("left", "right")


@st.cache_resource
def pool() -> ModelPool:
    """The models of this server's process, for all sessions."""
    return ModelPool()


class Offer(NamedTuple):
    """What a picker offers: its ``label`` there, its ``title`` over answers and in votes, its ``name`` for the pool."""

    label: str
    title: str
    name: str


def choices() -> dict[str, Offer]:
    """What the pickers offer, by the value in the page's address.

    The checkpoint that comes with the project first, then those of finished runs, the embedded model, and what needs a
    download.
    """
    found = {
        SHIPPED: Offer(f"{DEFAULT_MODEL} binarized, comes with the program", f"{DEFAULT_MODEL} binarized", SHIPPED)
    }
    for label, folder in checkpoints(store()).items():
        found[folder.parent.name] = Offer(label, label, str(folder))
    for entry in sorted(MODELS, key=lambda entry: entry.hub_id is not None):
        note = EMBEDDED_PRECISION if entry.hub_id is None else "from the hub"
        found[entry.id] = Offer(f"{entry.id}, {note}", entry.id, entry.id)
    return found


def pick(side: str, offered: dict[str, Offer]) -> str:
    """One side's picker; the value picked, which the page's address keeps."""
    key, seen = f"compare_{side}", f"compare_{side}_address"
    asked = st.query_params.get(side)
    if asked and asked != st.session_state.get(seen):
        st.session_state[key] = asked
    elif key not in st.session_state:
        st.session_state[key] = DEFAULT_MODEL if side == "left" else SHIPPED
    values = list(offered)
    if st.session_state[key] not in offered:
        values.append(st.session_state[key])
    value = st.selectbox(
        side.capitalize(),
        values,
        key=key,
        format_func=lambda value: offered[value].label if value in offered else str(value),
        accept_new_options=True,
        persist_state="session",
        help="Choose a checkpoint or a model of the catalogue, or type a run's id, a folder, a .gguf file or a hub id "
        "(owner/name).",
    )
    value = str(value or DEFAULT_MODEL)
    st.session_state[seen] = value
    if st.query_params.get(side) != value:
        st.query_params[side] = value
    return value


def resolve(value: str, offered: dict[str, Offer]) -> Offer:
    """What a picked value stands for. Raises ConfigError where a typed path lies outside the allowed folder."""
    return offered[value] if value in offered else Offer(value, value, model_name(value))


def hold(names: tuple[str, str]) -> tuple[Slot, Slot]:
    """The slots of both sides, held for this session; the ones it held before are let go."""
    held: tuple[Slot, Slot] | None = st.session_state.get("compare_slots")
    if held is not None and tuple(slot.name for slot in held) == names:
        return held
    left, right = (pool().get(name) for name in names)
    st.session_state["compare_slots"] = (left, right)
    return left, right


def retry() -> None:
    """Let a failed load be tried again."""
    st.session_state.pop("compare_slots", None)


def show_state(slot: Slot, side: str) -> None:
    """How far a model's loading is, followed until it has ended; then the model in a line."""
    if not slot.over:
        _follow(slot)
        return
    write_state(slot, st.empty())
    if slot.state == "failed":
        st.button("Try again", key=f"compare_retry_{side}", on_click=retry)


@st.fragment(run_every=0.4)
def _follow(slot: Slot) -> None:
    if slot.over:
        st.rerun()
    write_state(slot, st.empty())


def write_state(slot: Slot, place: DeltaGenerator) -> None:
    """A model's state as it is now, in a line."""
    if slot.state == "failed":
        place.error(sentence(slot.error))
    elif slot.state == "ready":
        place.caption(model_line(slot))
    else:
        place.caption(f":material/hourglass_empty: Loading for {slot.elapsed:.0f} s. You can already ask.")


def model_line(slot: Slot) -> str:
    """What a loaded model is, in a line of Markdown."""
    loaded = slot.loaded
    if loaded.packed:
        memory = size_text(loaded.weight_bytes)
        if loaded.expanded_bytes:
            memory += f" + {size_text(loaded.expanded_bytes)} expanded"
        parts = [plain(loaded.precision), f"{loaded.bpw:.2f} bits a weight", memory]
    else:
        parts = [plain(loaded.precision), f"{loaded.bpw:.0f} bits a weight in memory", size_text(loaded.weight_bytes)]
    if not loaded.is_chat:
        parts.append("**base model: goes on with your text** (no chat template)")
    return " · ".join(parts)
