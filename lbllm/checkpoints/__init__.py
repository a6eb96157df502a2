"""Packed checkpoints: writing, loading, finding and fast decoding."""
