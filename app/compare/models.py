"""The two model pickers of the compare page: their choices, the chosen models, and the state of loading.

A link may come from anybody, so an address only chooses models. They are loaded when the user asks for them: by a
picker, by the button "Load these models", or by a link inside the workbench.
"""

from __future__ import annotations

from typing import NamedTuple

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from app import visits
from app.paths import model_name
from app.view import checkpoints, plain, pool, sentence, size_text, store
from lbllm.chat.pool import Slot
from lbllm.checkpoints.find import ALONE, FoundCheckpoint, find_model
from lbllm.config import DEFAULT_MODEL, SHIPPED
from lbllm.errors import LbllmError
from lbllm.labels import bits_name
from lbllm.models.catalogue import EMBEDDED_PRECISION, MODELS
from lbllm.units import against_16_bits

SIDES = ("left", "right")


class Offer(NamedTuple):
    """A choice of a picker: ``label`` in the picker, ``title`` above answers and in votes, ``name`` for the pool."""

    label: str
    title: str
    name: str


def choices(*, running: bool = True) -> dict[str, Offer]:
    """Return the choices of the pickers, by their value in the page's address.

    First the checkpoint included in the project, then those of finished runs, the embedded model, and the models that
    need a download. ``running``: also checkpoints whose activations are quantized as models that leave them alone.
    """
    title = f"{DEFAULT_MODEL} binarized"
    packed = {SHIPPED: Offer(f"{title}, included in the program", title, SHIPPED)}
    for label, folder in checkpoints(store()).items():
        packed[folder.parent.name] = Offer(label, label, str(folder))
    found: dict[str, Offer] = {}
    for value, offer in packed.items():
        found[value] = offer
        if running and _quantizes(offer.name):
            found[f"{value}{ALONE}"] = _alone(offer)
    for entry in sorted(MODELS, key=lambda entry: entry.hub_id is not None):
        note = EMBEDDED_PRECISION if entry.hub_id is None else "from the hub"
        found[entry.id] = Offer(f"{entry.id}, {note}", entry.id, entry.id)
    return found


def pick(side: str, offered: dict[str, Offer]) -> str:
    """Show one side's picker; return the chosen value, which the page's address keeps."""
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
        on_change=_picked,
        args=(key,),
        help="Choose a checkpoint or a model of the catalogue, or type a run's id, a folder, a .gguf file or a hub id "
        "(owner/name).",
    )
    value = str(value or DEFAULT_MODEL)
    st.session_state[seen] = value
    if st.query_params.get(side) != value:
        st.query_params[side] = value
    return value


def _picked(key: str) -> None:
    allow(str(st.session_state[key] or ""))


def allow(*values: str) -> None:
    """The user asked for these models by a click: this browser may load them."""
    visits.visit().models.update(values)


def allowed(side: str, value: str) -> bool:
    """Whether a picked model may be loaded: not if it only stands in the address that the session began with."""
    if value in (SHIPPED, DEFAULT_MODEL) or not visits.came_by_link(side, value):
        return True
    return value in visits.visit().models


def _alone(offer: Offer) -> Offer:
    label, title, name = offer
    return Offer(f"{label}, activations left alone", f"{title}, activations left alone", f"{name}{ALONE}")


def _quantizes(name: str) -> bool:
    """Whether this is the name of a checkpoint whose activations or KV cache have less than 16 bits."""
    try:
        found = find_model(name)
        return isinstance(found, FoundCheckpoint) and found.quantizes
    except LbllmError:  # loading it says what is wrong
        return False


def mode_switch(side: str, offer: Offer) -> None:
    """Where the activations of a picked checkpoint are quantized: a switch that leaves them alone. It picks the other
    model of the two."""
    if not _quantizes(offer.name):
        return
    key, shown = f"compare_{side}", f"compare_{side}_alone"
    st.session_state[shown] = offer.name.endswith(ALONE)
    st.toggle(
        "Leave activations alone",
        key=shown,
        on_change=_switch,
        args=(key, shown),
        help="The inputs of its layers and its KV cache then have 16 bits instead of those that it was made for. The "
        "weights are the same.",
    )


def _switch(key: str, shown: str) -> None:
    base = str(st.session_state[key]).removesuffix(ALONE)
    st.session_state[key] = f"{base}{ALONE}" if st.session_state[shown] else base
    _picked(key)


def resolve(value: str, offered: dict[str, Offer]) -> Offer:
    """Return the choice of a picked value. Raises ConfigError if a typed path is outside the allowed folder."""
    if value in offered:
        return offered[value]
    if value.endswith(ALONE):
        model_name(value)  # refuses what is no packed checkpoint
        return _alone(resolve(value.removesuffix(ALONE), offered))
    return Offer(value, value, model_name(value))


def hold(names: tuple[str, str], key: str = "compare_slots") -> tuple[Slot, Slot]:
    """Return the slots of both sides and hold them for this session, as ``key`` of its state; it releases the slots it
    held there before."""
    held: tuple[Slot, Slot] | None = st.session_state.get(key)
    if held is not None and tuple(slot.name for slot in held) == names:
        return held
    left, right = (pool().get(name) for name in names)
    st.session_state[key] = (left, right)
    return left, right


def retry() -> None:
    """Allow another attempt after loading failed."""
    st.session_state.pop("compare_slots", None)


def show_state(slot: Slot, side: str) -> None:
    """Show the state of a model while it is loading, then one line about the model."""
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
    """Write one line with a model's present state."""
    if slot.state == "failed":
        place.error(sentence(slot.error))
    elif slot.state == "ready":
        place.caption(model_line(slot))
    else:
        place.caption(f":material/hourglass_empty: Loading for {slot.elapsed:.0f} s. You can already ask.")


def model_line(slot: Slot) -> str:
    """Return one line of Markdown about a loaded model: precision, bits, memory."""
    loaded = slot.loaded
    bits = bits_name(packed=loaded.packed)
    if loaded.packed:
        memory = size_text(loaded.weight_bytes)
        if loaded.expanded_bytes:
            memory += f" + {size_text(loaded.expanded_bytes)} expanded"
        parts = [plain(loaded.precision), f"{loaded.bpw:.2f} {bits}", memory]
    else:
        parts = [plain(loaded.precision), f"{loaded.bpw:.0f} {bits}", size_text(loaded.weight_bytes)]
    parts.append(against_16_bits(loaded.weight_bytes + loaded.expanded_bytes, loaded.weights))
    if not loaded.is_chat:
        parts.append("**base model: continues your text** (no chat template)")
    return " · ".join(parts)
