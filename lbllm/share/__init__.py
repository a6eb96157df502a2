"""Sharing: exports, model cards, Spaces and uploads."""
