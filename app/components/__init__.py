"""Components that Streamlit does not have."""

from __future__ import annotations

from pathlib import Path

# JavaScript that the parts of several components begin with.
TOKENS = Path(__file__).with_name("tokens.js").read_text()
