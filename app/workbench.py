"""The entry script of the workbench: pages, navigation, title. ``python -m lbllm ui`` starts its server."""

from __future__ import annotations

import streamlit as st

from app import tour, visits
from app.components import browser
from app.view import THEME, guard

st.set_page_config(page_title="LBLLM Workbench", layout="wide", initial_sidebar_state="collapsed")
st.logo(str(THEME / "logo.svg"), size="medium")
st.html(THEME / "workbench.css")
first = st.Page("pages/compare.py", title="Compare", url_path="compare")


def home() -> None:
    """Lead from the bare address to the first page."""
    st.switch_page(first, query_params=dict(st.query_params))


page = st.navigation(
    [
        st.Page(home, title="Home", default=True, visibility="hidden"),
        first,
        st.Page("pages/quantize.py", title="Quantize", url_path="quantize"),
        st.Page("pages/runs.py", title="Runs", url_path="runs"),
        st.Page("pages/evaluate.py", title="Evaluate", url_path="evaluate"),
        st.Page("pages/inspect.py", title="Inspect", url_path="inspect"),
        st.Page("pages/learn.py", title="Learn", url_path="learn"),
    ],
    position="top",
)
visits.arrive()
shown = page == first and tour.show()
browser.attend(tour=shown)
with guard():
    page.run()
if page == first:
    tour.offer()
