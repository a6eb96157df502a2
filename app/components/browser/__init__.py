"""What only the browser can do for every page: remember that the tour was shown, and notice that the server is gone."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

TOUR_COOKIE = "lbllm_tour"
_browser = st.components.v2.component("lbllm.browser", js=(Path(__file__).parent / "browser.js").read_text())


def attend(*, tour: bool) -> None:
    """Watch the server from the page. ``tour``: the tour is on the page, and need not come again in this browser."""
    _browser(key="browser", data={"tour": TOUR_COOKIE if tour else ""})
