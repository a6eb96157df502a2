"""A Plotly figure that is updated in place: new data keeps the DOM node, zoom, pan and hidden traces.

    payload = encode(figure, label="Loss of block 3")
    clicked = live_chart(payload, key="loss")

``st.plotly_chart`` builds a new chart for new data. The JavaScript of Plotly comes from the installed package, through
this server; each page loads it once.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import plotly
import streamlit as st
from streamlit.components.v2.manifest_scanner import ComponentConfig, ComponentManifest
from streamlit.runtime import Runtime

_LIBRARY = "lbllm.plotly"
_SOURCE = f"_stcore/bidi-components/{_LIBRARY}/plotly.min.js"
_AXIS = {
    "gridcolor": "--st-border-color-light",
    "linecolor": "--st-border-color",
    "zerolinecolor": "--st-border-color-light",
    "nticks": 7,
}
_LAYOUT: dict[str, Any] = {
    "paper_bgcolor": "rgba(0,0,0,0)",
    "plot_bgcolor": "rgba(0,0,0,0)",
    "font": {"color": "--st-text-color", "family": "--st-font", "size": 13},
    # Plotly would take the border's colour for the text.
    "hoverlabel": {
        "bgcolor": "--st-background-color",
        "bordercolor": "--st-border-color",
        "font": {"color": "--st-text-color", "family": "--st-font"},
    },
    "modebar": {"bgcolor": "rgba(0,0,0,0)", "color": "--st-gray-text-color", "activecolor": "--st-text-color"},
    "margin": {"l": 56, "r": 12, "t": 50, "b": 44},
    "legend": {"orientation": "h", "y": 1.0, "yanchor": "bottom", "x": 0},
    "uirevision": "kept",
    "height": 300,
}
_CONFIG = {
    "displaylogo": False,
    # By default Plotly offers to send a chart to its makers' website.
    "showSendToCloud": False,
    "plotlyServerURL": "",
    "scrollZoom": False,
    "modeBarButtonsToRemove": ["select2d", "lasso2d", "zoomIn2d", "zoomOut2d", "autoScale2d"],
}

_chart = st.components.v2.component(
    "lbllm.live_chart", js=Path(__file__).with_name("live_chart.js").read_text(), isolate_styles=False
)


def encode(figure: dict[str, Any], *, label: str, stamp: int = 0) -> bytes:
    """Return the data for ``live_chart``: the figure's traces, and its layout merged into the common layout.

    In the browser, each string ``--st-...`` in the figure becomes the theme's value, for light and dark themes. Each
    trace needs a constant ``uid``. Screen readers read ``label``; ``stamp`` appears as the node's ``data-stamp`` when
    the figure is drawn. Raises ValueError if the figure contains NaN; use None instead.
    """
    layout = _LAYOUT | figure.get("layout", {})
    for name in [name for name in layout if name.startswith(("xaxis", "yaxis"))]:
        layout[name] = _AXIS | layout[name]
    config = _CONFIG | {"displayModeBar": False} if layout.get("dragmode") is False else _CONFIG
    document = {"data": figure["data"], "layout": layout, "config": config}
    payload = {"source": _SOURCE, "label": label, "stamp": stamp, "figure": document}
    return json.dumps(payload, separators=(",", ":"), allow_nan=False).encode()


def live_chart(payload: bytes, *, key: str) -> dict[str, Any] | None:
    """Show an encoded figure; return the point that was just clicked (``x``, ``y`` and the ``trace``'s uid) or None.

    Showing the same payload again is cheap, because the browser already has it.
    """
    _serve_library()
    result = _chart(key=key, data=payload, on_click_change=_nothing)
    clicked: dict[str, Any] | None = result.click
    return clicked


def _nothing() -> None:
    """A callback without effect: Streamlit reports clicks only for components that have a callback."""


def _serve_library() -> None:
    """Make the server serve the folder with Plotly's JavaScript, as the folder of an installed component."""
    if not Runtime.exists():
        return
    registry = Runtime.instance().bidi_component_registry
    if registry.get_component_asset_root(_LIBRARY) is None:
        package = Path(plotly.__file__).parent
        config = ComponentConfig("plotly", asset_dir="package_data")
        registry.register_from_manifest(ComponentManifest("lbllm", "1", [config]), package)
