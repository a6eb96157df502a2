"""The map of blocks and layers: its colours, how it fills, what it says of the whole."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, ParamSpec

import streamlit as st

from app.components.microscope_view import map_view
from app.components.shown import with_index
from app.microscope import state
from app.microscope.filling import Cell, Filling, Step, Work, filling
from app.view import guard, number_text, sentence
from lbllm.microscope.address import Address
from lbllm.microscope.costs import costs
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.overview import METRICS, MetricName
from lbllm.microscope.pair import Pair

P = ParamSpec("P")
Unit = Literal["share", "bits", "nats"]


@dataclass(frozen=True)
class Colour:
    """What a map shows. ``on_text``: it needs both models and a text."""

    label: str
    unit: Unit
    about: str
    on_text: bool = False


COLOURS: dict[str, Colour] = {
    **{name: Colour(metric.label, metric.unit, metric.about) for name, metric in METRICS.items()},
    "output": Colour(
        "Output error on the sentence",
        "share",
        "||X W - X_q W_q||^2 / ||X W||^2, with the layer's inputs X in the teacher",
        on_text=True,
    ),
    "cost": Colour(
        "Cost of a layer on the sentence",
        "nats",
        "KL from the teacher, in nats a token, if only this layer is binarized",
        on_text=True,
    ),
}


def value_text(unit: Unit, value: float) -> str:
    """A value of a map as text."""
    if unit == "share":
        return f"{number_text(100 * value)} %"
    return f"{value:.2f} bits" if unit == "bits" else f"{number_text(value)} nats"


def pick_colour() -> str:
    """The picker of the colour; returns its name. An unknown one in the address is the default."""
    chosen = state.value("colour")
    if chosen not in COLOURS:
        chosen = state.DEFAULTS["colour"]
    st.selectbox(
        "Colour",
        list(COLOURS),
        **with_index(state.bound("colour", chosen), list(COLOURS)),
        format_func=lambda name: COLOURS[name].label,
        on_change=state.taken,
        args=("colour",),
        help="What the map shows of each layer. Two of them read your sentence with both models.",
    )
    return chosen


@dataclass(frozen=True)
class Map:
    """A map as far as it is known; ``about``: what its values are."""

    scope: Microscope
    colour: Colour
    name: str
    about: str
    filling: Filling
    work: Work

    def known(self) -> dict[Cell, float]:
        """All values that are known."""
        found = dict(self.filling.values.get(self.name, {}))
        return {cell: value for cell, value in found.items() if value is not None}


def map_of_files(scope: Microscope, name: MetricName) -> Map:
    """The map of a metric that comes from the files."""

    overview = scope.overview(name)

    def work(block: int) -> Iterator[Step]:
        for layer, value in zip(scope.layers, overview.row(block), strict=True):
            yield (block, layer), {name: value}

    own = filling(scope.fingerprint, scope.teacher_name, name)
    return Map(scope, COLOURS[name], name, overview.about, own, work)


def map_on_text(scope: Microscope, name: str, pair: Pair, text: str) -> Map:
    """The map of what each layer costs on a text."""

    def work(block: int) -> Iterator[Step]:
        for cost in costs(pair, text, blocks=[block]):
            yield (cost.block, cost.layer), {"cost": cost.kl, "output": cost.output_error}

    own = filling(scope.fingerprint, scope.teacher_name, "on text", text)
    return Map(scope, COLOURS[name], name, COLOURS[name].about, own, work)


def show_map(shown: Map | None, scope: Microscope, at: Address, waiting: str = "") -> None:
    """The map, which fills while it is looked at; without values where it needs something first, which ``waiting``
    says."""
    if shown is None:
        _draw(None, scope, at, waiting)
        return
    runs_alone(_show_part, shown, every=0.5)(shown, at, growing=not shown.filling.done)


def runs_alone(part: Callable[P, None], shown: Map, *, every: float) -> Callable[P, None]:
    """A part of the page that runs alone, every so many seconds while the map fills. It runs alone when the map has
    filled, too: a click that was sent before that names this part, and would be lost if there were none."""
    return st.fragment(part, run_every=None if shown.filling.done else every)


def _show_part(shown: Map, at: Address, *, growing: bool) -> None:
    own = shown.filling
    with guard():
        if growing:
            own.look(shown.work, shown.scope.blocks, at.block)
        state.follow()
        if growing and own.done:
            st.rerun()
        _draw(
            shown,
            shown.scope,
            at,
            f"{len(own.blocks)} of {shown.scope.blocks} blocks are computed" if growing else "",
        )
        if own.done and own.error:
            st.error(sentence(own.error))
            st.button("Try again", key="inspect_again", on_click=_again, args=(own,))


def _again(own: Filling) -> None:
    own.again()
    state.go()


def _draw(shown: Map | None, scope: Microscope, at: Address, progress: str) -> None:
    known = shown.known() if shown is not None else {}
    unit: Unit = shown.colour.unit if shown is not None else "share"

    def cell(block: int, layer: str) -> tuple[float | None, str | None]:
        if scope.formats[block].get(layer) is None:
            return None, "dense" if layer in scope.shapes[block] else "not in this block"
        found = known.get((block, layer))
        if found is None:
            return None, "has none" if shown is not None and shown.filling.done else None
        return found, value_text(unit, found)

    low, high = (min(known.values()), max(known.values())) if known else (0.0, 1.0)
    column = scope.layers.index(at.layer) if at.layer in scope.layers else None
    data = {
        "label": f"{shown.colour.label if shown else 'Layers'} of {scope.title}, a row for each block; arrow keys "
        "move, Enter opens a layer or, at the left, a block",
        "rows": [str(block + 1) for block in range(scope.blocks)],
        "columns": [{"short": short, "name": name} for short, name in short_names(scope.layers).items()],
        "values": [[cell(block, layer) for layer in scope.layers] for block in range(scope.blocks)],
        "low": low,
        "high": high,
        "low_text": value_text(unit, low) if known else None,
        "high_text": value_text(unit, high) if known else None,
        "chosen": [at.block, column],
        "progress": progress,
    }
    map_view(data, key="inspect_map", go=partial(_go, scope))


def _go(scope: Microscope, sent: list[int]) -> None:
    """The user chose a place on the map."""
    block, column = sent
    if 0 <= block < scope.blocks and column < len(scope.layers):
        state.go(at=str(Address(block, scope.layers[column] if column >= 0 else None)))


def short_names(layers: list[str]) -> dict[str, str]:
    """Short names of layers, for the head of the map, with the whole ones: as few last parts as tell a layer from all
    others, such as q, k, experts.0.up; a number never stands first."""
    places = [name.removesuffix("_proj").split(".") for name in layers]
    counts = Counter(".".join(parts[-kept:]) for parts in places for kept in range(1, len(parts) + 1))

    def short(parts: list[str]) -> str:
        for kept in range(1, len(parts)):
            found = ".".join(parts[-kept:])
            if counts[found] == 1 and not parts[-kept].isdecimal():
                return found
        return ".".join(parts)

    names = [short(parts) for parts in places]
    return dict(zip(names if len(set(names)) == len(layers) else layers, layers, strict=True))
