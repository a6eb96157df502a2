"""The page runs; its content follows."""

import streamlit as st

st.header("Runs")
