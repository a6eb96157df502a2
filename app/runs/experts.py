"""What each expert of a block saw in a stage, and what it lost."""

from __future__ import annotations

import pandas as pd
import streamlit as st

from app.runs.charts import Chosen, place_name
from lbllm.runs.view import RunView


def show_experts(view: RunView, chosen: Chosen) -> None:
    """The experts of the chosen block that are done: their tokens, and their loss before and after; nothing for a block
    without experts."""
    block = view.blocks.get(chosen)
    if block is None or not block.experts:
        return
    done = [*block.experts.values()]
    without = sum(event.tokens == 0 for event in done)
    few, most = min(event.tokens for event in done), max(event.tokens for event in done)
    with st.expander(f"Experts of {place_name(chosen)}: {len(done)} done, {few:,} to {most:,} tokens each"):
        st.dataframe(
            pd.DataFrame(
                {
                    "Expert": [event.expert for event in done],
                    "Tokens": [event.tokens for event in done],
                    "Loss before": [event.loss_before for event in done],
                    "Loss after": [event.loss_after for event in done],
                }
            ),
            hide_index=True,
            width="stretch",
            column_config={
                name: st.column_config.NumberColumn(format="%.4f") for name in ("Loss before", "Loss after")
            },
        )
        text = "Relative loss on the tokens that chose the expert; in stages 2 and 3, of all experts together."
        st.caption(text + (f" {without} saw no token: they are fitted to all tokens of the layer." if without else ""))
