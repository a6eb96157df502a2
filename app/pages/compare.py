"""The page compare; its content follows."""

import streamlit as st

st.header("Compare")
