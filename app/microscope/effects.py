"""Cause and effect: a change of one place, and what the sentence does."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import streamlit as st

from app.components.live_chart import encode, live_chart
from app.components.microscope_view import words_view
from app.components.shown import with_default, with_value
from app.microscope import state
from app.microscope.changes import FORMATS, KINDS, MOST, ROUNDED, Change, choice_of, missing, name_of
from app.microscope.figures import show_figures, words_html
from app.microscope.filling import click
from app.view import COLOURS, number_text, plain
from lbllm.chat.settings import ChatSettings
from lbllm.labels import FORMAT_NAMES
from lbllm.microscope.address import Address
from lbllm.microscope.effect import Effect, Reading, answer, effect
from lbllm.microscope.hybrid import Choice, FirstBlocks
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.pair import Pair

_KEPT = 40
_ANSWER = ChatSettings(temperature=0, max_new_tokens=48)
_SCOPES = {"layer": "This layer", "block": "Its whole block"}


def show_effects(pair: Pair, scope: Microscope, at: Address, text: str) -> None:
    """The change, its effect, and the answers on request. Raises LbllmError."""
    change = Change.parse(state.value("change"))
    with st.container(horizontal=True, key="inspect_change"):
        st.segmented_control(
            "Change",
            list(KINDS),
            required=True,
            **with_default(state.bound("kind", change.kind)),
            format_func=KINDS.__getitem__,
            on_change=_kind,
            args=(scope,),
            label_visibility="collapsed",
            wrap=True,
        )
        if change.kind in ("dense", "only") and at.layer is not None:
            _pick_scope(change)
    lacks = missing(change, at)
    if lacks:
        st.markdown(lacks)
        return
    levels = _controls(change, scope, at)
    choice = choice_of(change, at, scope, levels)
    found = _effect(pair, scope, choice, text)
    name = name_of(change, at)
    _show(found, name, change)
    # Next to the tokens: a chart between them would put the answers out of sight.
    _answers(pair, scope, choice, name, text)
    if change.kind == "first":
        _curve(found, scope, text)


def _kind(scope: Microscope) -> None:
    """Another kind of change was chosen: begin with its first detail."""
    kind = str(st.session_state["inspect_kind"])
    first = {"dense": "layer", "only": "layer", "first": str(scope.blocks // 2), "levels": "", "bits": "4"}
    state.go(change=f"{kind}:{first[kind]}")


def _pick_scope(change: Change) -> None:
    st.segmented_control(
        "What is changed",
        list(_SCOPES),
        required=True,
        **with_default(state.bound("detail", change.detail)),
        format_func=_SCOPES.__getitem__,
        on_change=_detail,
        args=(change.kind,),
        label_visibility="collapsed",
    )


def _detail(kind: str) -> None:
    state.go(change=f"{kind}:{st.session_state['inspect_detail']}")


def _controls(change: Change, scope: Microscope, at: Address) -> tuple[float, ...]:
    """What the change needs besides the place; returns the stored levels where they are to be changed."""
    if change.kind == "first":
        st.slider(
            f"How many of the {scope.blocks} blocks are binarized, from the first on",
            0,
            scope.blocks,
            **with_value(state.bound("detail", min(int(change.detail), scope.blocks))),
            on_change=_detail,
            args=("first",),
        )
    elif change.kind == "bits":
        options = [*ROUNDED, *FORMATS]
        st.segmented_control(
            "Quantize this layer anew, without training",
            options,
            required=True,
            **with_default(state.bound("detail", change.detail)),
            format_func=lambda name: (
                FORMAT_NAMES[FORMATS[name]] if name in FORMATS else f"{name} bit{'' if name == '1' else 's'}"
            ),
            on_change=_detail,
            args=("bits",),
            help="A number of bits rounds the teacher's weights to the nearest of as many values in the same groups; "
            f"{' and '.join(FORMAT_NAMES.values())} fit levels to them.",
        )
    elif change.kind == "levels":
        return _pick_levels(change, scope, at)
    return ()


def _pick_levels(change: Change, scope: Microscope, at: Address) -> tuple[float, ...]:
    assert at.row is not None
    assert at.group is not None
    layer = scope.layer(at)
    group = layer.group(at.row, at.group)
    stored = tuple(group.levels.tolist())
    shown = change.levels or stored
    if len(shown) != len(stored):
        shown = stored
    step = float(f"{max(abs(float(group.weights.abs().max())), 1e-6) / 20:.1g}")
    with st.container(horizontal=True, vertical_alignment="bottom", key="inspect_levels"):
        for number, level in enumerate(shown):
            st.number_input(
                f"Level {number + 1}",
                -MOST,
                MOST,
                step=step,
                format="%.4f",
                **with_value(state.bound(f"level_{number}", round(level, 6))),
                on_change=_edited,
                args=(len(shown),),
            )
        st.button("As stored", key="inspect_levels_reset", on_click=state.go, kwargs={"change": "levels:"})
    groups = layer.shape[0] * layer.groups
    st.caption(f"{plain(state.place_words(at))}: one of {groups:,} groups in this layer.")
    return shown


def _edited(count: int) -> None:
    values = [st.session_state[f"inspect_level_{number}"] for number in range(count)]
    state.go(change="levels:" + ",".join(f"{value:.6g}" for value in values))


def _effect(pair: Pair, scope: Microscope, choice: Choice, text: str) -> Effect:
    kept: OrderedDict[tuple[object, ...], Effect] = st.session_state.setdefault("inspect_effects", OrderedDict())
    key = (scope.fingerprint, scope.teacher_name, choice, text)
    if key not in kept:
        with st.spinner("The models read the sentence"), click():
            kept[key] = effect(pair, choice, text)
        while len(kept) > _KEPT:
            kept.popitem(last=False)
    return kept[key]


def _show(found: Effect, name: str, change: Change) -> None:
    share, words = abs(found.returned), "of it is added" if found.returned < 0 else "of it is taken away"
    if change.kind in ("only", "first"):
        share, words = 1 - found.returned, "of the student's"
    show_figures(
        (number_text(found.hybrid.kl), "nats a token from the teacher"),
        (number_text(found.student.kl), "the student as it is"),
        (f"{100 * share:{',.0f' if share >= 1 else '.3g'}} %", words),
    )
    models = [
        _column("teacher", "Teacher", found.teacher),
        _column("hybrid", name, found.hybrid),
        _column("student", "Student", found.student),
    ]
    words_view({"place": name, "models": models, "expected": found.teacher.next[0].text}, key="inspect_words")
    if found.left_out:
        st.caption(f"The last {found.left_out} tokens of the sentence are not read: it is too long.")


def _curve(found: Effect, scope: Microscope, text: str) -> None:
    """The divergence against the number of binarized blocks, as far as it was tried. Its ends are always known."""
    kept: OrderedDict[tuple[object, ...], Effect] = st.session_state["inspect_effects"]
    tried = {0: 0.0, scope.blocks: found.student.kl}
    for (*of, choice, read), one in kept.items():
        if isinstance(choice, FirstBlocks) and (*of, read) == (scope.fingerprint, scope.teacher_name, text):
            tried[choice.count] = one.hybrid.kl
    counts = sorted(tried)
    here = found.choice.count if isinstance(found.choice, FirstBlocks) else 0
    traces: list[dict[str, Any]] = [
        {
            "type": "scatter",
            "mode": "lines+markers",
            "uid": "tried",
            "x": counts,
            "y": [tried[count] for count in counts],
            "line": {"color": COLOURS["ptq"], "width": 2},
            "hovertemplate": "%{x} blocks: %{y:.3g}<extra></extra>",
        },
        {
            "type": "scatter",
            "mode": "markers",
            "uid": "here",
            "x": [here],
            "y": [tried[here]],
            "marker": {"size": 14, "color": "rgba(0,0,0,0)", "line": {"color": COLOURS["bad"], "width": 2.5}},
            "hoverinfo": "skip",
        },
    ]
    layout = {
        "height": 200,
        "showlegend": False,
        "dragmode": False,
        "margin": {"l": 56, "r": 12, "t": 10, "b": 44},
        "xaxis": {"title": {"text": "binarized blocks"}},
        "yaxis": {"title": {"text": "nats a token"}, "rangemode": "tozero"},
    }
    payload = encode({"data": traces, "layout": layout}, label="Divergence by the number of binarized blocks")
    live_chart(payload, key="inspect_curve")


def _column(kind: str, name: str, reading: Reading) -> dict[str, object]:
    return {
        "kind": kind,
        "name": name,
        "note": f"perplexity of the sentence {number_text(reading.perplexity)}",
        "tokens": [(candidate.text, candidate.probability) for candidate in reading.next],
    }


def _answers(pair: Pair, scope: Microscope, choice: Choice, name: str, text: str) -> None:
    """All three answers to the sentence, written one after the other when they are asked for."""
    models = [("Teacher", FirstBlocks(0)), (name, choice), ("Student", FirstBlocks(pair.blocks))]
    who = ("The teacher", "The changed model", "The student")
    kept: dict[tuple[object, ...], str] = st.session_state.setdefault("inspect_answers", {})
    keys = [(scope.fingerprint, scope.teacher_name, one, text) for _, one in models]
    with st.container(horizontal=True, vertical_alignment="center"):
        asked = st.button("Let all three answer", key="inspect_answer", icon=":material/chat:")
        beside = st.container(width="content")
    if not asked and not any(key in kept for key in keys[1:2]):
        return
    places = []
    for (title, _), key, column in zip(models, keys, st.columns(3), strict=True):
        column.markdown(f"**{plain(title)}**")
        places.append(column.empty())
        if key in kept:
            places[-1].html(words_html(kept[key]))
    for (_, one), key, place, writer in zip(models, keys, places, who, strict=True):
        if key in kept:
            continue
        written = ""
        with beside, st.spinner(f"{writer} answers"):
            for piece in _pieces(pair, one, text):
                written += piece
                place.html(words_html(f"{written} ▌"))
        kept[key] = written
        place.html(words_html(written or "No text."))


def _pieces(pair: Pair, choice: Choice, text: str) -> Iterator[str]:
    messages = [{"role": "user", "content": text}]
    for piece in answer(pair, choice, messages, _ANSWER):
        yield piece.text + (" …" if piece.cut else "")
