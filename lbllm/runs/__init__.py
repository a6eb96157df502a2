"""Runs: the store of their events, and the state that follows from those."""
