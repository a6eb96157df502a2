"""Votes on the compare page: which answer is better, the tally of the pair, and the export of all votes."""

from __future__ import annotations

import time
from collections.abc import Sequence

import streamlit as st

from app.view import plain, store
from lbllm.chat.conversation import Exchange
from lbllm.chat.votes import CHOICES, Choice, Vote, VoteStore, tally, votes_csv, votes_json

_LABELS: dict[Choice, str] = {
    "left": "Left is better",
    "right": "Right is better",
    "tie": "Tie",
    "both bad": "Both bad",
}


def _votes() -> VoteStore:
    return VoteStore(store().database)


def votes_of(exchanges: Sequence[Exchange]) -> dict[str, Choice]:
    """Return the votes on these exchanges, by exchange id."""
    wanted = {exchange.id for exchange in exchanges}
    return {vote.exchange: vote.choice for vote in _votes().all() if vote.exchange in wanted}


def show_votes(exchange: Exchange) -> None:
    """Show the four choices for a vote on an exchange, the pair's tally, and the export."""
    votes = _votes().all()
    present = next((vote.choice for vote in votes if vote.exchange == exchange.id), None)
    bar = st.columns([4.6, 3.4, 1.4], vertical_alignment="center")
    bar[0].segmented_control(
        "Which answer is better?",
        CHOICES,
        default=present,
        format_func=lambda choice: _LABELS[choice],
        key=f"compare_vote_{exchange.id}",
        label_visibility="collapsed",
        on_change=cast,
        args=(exchange,),
    )
    counted = tally(votes, *exchange.names)
    if counted.total:
        bar[1].caption(
            f"{counted.total} vote{'s' if counted.total > 1 else ''} on this pair: {counted.left} for "
            f"{plain(exchange.names[0])}, {counted.right} for {plain(exchange.names[1])}, {counted.tie} tie, "
            f"{counted.both_bad} both bad"
        )
    else:
        bar[1].caption("No votes on this pair yet.")
    if votes:
        with bar[2].popover("Votes"):
            st.caption(f"All {len(votes)} stored votes, with prompts, answers and settings.")
            st.download_button("As CSV", lambda: votes_csv(_votes().all()), "votes.csv", "text/csv", on_click="ignore")
            st.download_button(
                "As JSON", lambda: votes_json(_votes().all()), "votes.json", "application/json", on_click="ignore"
            )


def cast(exchange: Exchange) -> None:
    """Store the chosen vote; choosing it a second time removes it."""
    choice = st.session_state[f"compare_vote_{exchange.id}"]
    if choice is None:
        _votes().withdraw(exchange.id)
        return
    left, right = exchange.answers
    _votes().put(
        Vote(
            exchange=exchange.id,
            time=time.time(),
            left=exchange.names[0],
            right=exchange.names[1],
            choice=choice,
            prompt=exchange.prompt,
            left_answer=left.text,
            right_answer=right.text,
            left_settings=exchange.settings[0],
            right_settings=exchange.settings[1],
        )
    )
