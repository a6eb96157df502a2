"""The page quantize; its content follows."""

import streamlit as st

st.header("Quantize")
