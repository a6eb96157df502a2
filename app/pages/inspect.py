"""Inspect: a checkpoint beside its teacher, from the whole model to one bit, and what a change of it does to a text."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import streamlit as st

from app.components.microscope_view import link_button
from app.components.shown import with_default, with_value
from app.microscope import models, state
from app.microscope.activations import PARTS, show_activations
from app.microscope.effects import show_effects
from app.microscope.maps import COLOURS, Map, map_of_files, map_on_text, pick_colour, show_map
from app.microscope.weights import show_weights
from app.view import guard, plain, sentence
from lbllm.errors import LbllmError
from lbllm.microscope.address import Address
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.overview import MetricName
from lbllm.microscope.pair import Pair

STYLE = Path(__file__).parents[1] / "microscope" / "style.css"
VIEWS = {"weights": "Weights", "activations": "Activations", "change": "Cause and effect"}


def page() -> None:
    """The whole page."""
    st.html(STYLE)
    state.arrive()
    with st.container(key="inspect_top"):
        first, second, third, last = st.columns([6, 4, 5, 5], vertical_alignment="bottom")
        with first:
            models.pick_model()
        with second:
            models.pick_teacher()
        with third:
            colour = pick_colour()
        with last:
            text = _sentence()
    unread = models.unread()
    if unread:
        models.ask_to_read(unread)
        return
    name, teacher = models.chosen()
    scope = models.microscope(name, teacher)
    at, problem = _place(scope)
    left, right = st.columns([5, 11], gap="large")
    view = _view()
    with right:
        _crumbs(at)
        _pick_view(view)
        body = st.container()
    on_text = COLOURS[colour].on_text
    pair = None
    with left if view == "weights" else body, guard():
        if problem is None and (on_text or view != "weights"):
            pair = models.pair(scope, name)
    with left, guard():
        shown = _map(scope, colour, text, pair)
        show_map(shown, scope, at, "" if shown is not None else "This colour reads your sentence with both models.")
    with body, guard():
        if problem is not None:
            st.error(problem)
            st.button("Show the whole model", key="inspect_whole", on_click=state.go, kwargs={"at": ""})
        elif view == "weights":
            show_weights(scope, at, shown)
        elif pair is not None and view == "change":
            show_effects(pair, scope, at, text)
        elif pair is not None:
            show_activations(pair, scope, at, text, view)


def _sentence() -> str:
    """The picker of the text."""
    chosen = state.value("text")[: state.LONGEST_TEXT]
    st.text_input(
        "Your sentence",
        **with_value(state.bound("text", chosen)),
        max_chars=state.LONGEST_TEXT,
        on_change=state.taken,
        args=("text",),
        help="What the parts on a text read: activations, cause and effect, and two of the colours.",
    )
    return chosen


def _place(scope: Microscope) -> tuple[Address, str | None]:
    """The place that the address names, and what is wrong with it."""
    try:
        return scope.check(state.value("at")), None
    except LbllmError as error:
        return Address(), sentence(error)


def _view() -> str:
    """The view that the address names; an unknown one is the first."""
    view = state.value("view")
    return view if view in (*VIEWS, *PARTS) else "weights"


def _pick_view(view: str) -> None:
    st.segmented_control(
        "View",
        list(VIEWS),
        required=True,
        **with_default(state.bound("view", "activations" if view in PARTS else view)),
        format_func=VIEWS.__getitem__,
        on_change=state.taken,
        args=("view",),
        label_visibility="collapsed",
    )


def _crumbs(at: Address) -> None:
    """The way from the whole to the place; each part leads back to it. At its end the link to copy."""
    steps = [("Whole model", Address())]
    if at.block is not None:
        steps.append((state.block_words(at.block), Address(at.block)))
    if at.layer is not None:
        steps.append((at.layer, at.of_layer))
    if at.row is not None:
        steps.append((f"row {at.row}" + (f", group {at.group}" if at.group is not None else ""), at))
    with st.container(horizontal=True, vertical_alignment="center", key="inspect_crumbs"):
        for number, (label, place) in enumerate(steps):
            last = number == len(steps) - 1
            if last:
                st.markdown(f"**{plain(label)}**", width="content")
            else:
                go = {"at": str(place)}
                st.button(plain(label), key=f"inspect_step_{number}", type="tertiary", on_click=state.go, kwargs=go)
                st.markdown("›", width="content")
        with st.container(key="inspect_link", width="content"):
            link_button(key="inspect_copy")


def _map(scope: Microscope, colour: str, text: str, pair: Pair | None) -> Map | None:
    """The map of a colour; None where it needs models that are not loaded."""
    if not COLOURS[colour].on_text:
        return map_of_files(scope, cast(MetricName, colour))
    return map_on_text(scope, colour, pair, text) if pair is not None else None


with guard():
    page()
