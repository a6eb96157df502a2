"""The entry script of the workbench: pages, navigation, title. ``python -m lbllm ui`` starts its server."""

from __future__ import annotations

import streamlit as st

from app import tour
from app.view import THEME, guard

st.set_page_config(page_title="LBLLM Workbench", layout="wide", initial_sidebar_state="collapsed")
st.logo(str(THEME / "logo.svg"), size="medium")
first = st.Page("pages/compare.py", title="Compare", url_path="compare", default=True)
page = st.navigation(
    [
        first,
        st.Page("pages/quantize.py", title="Quantize", url_path="quantize"),
        st.Page("pages/runs.py", title="Runs", url_path="runs"),
    ],
    position="top",
)
if page == first:
    tour.show()
with guard():
    page.run()
if page == first:
    tour.offer()
