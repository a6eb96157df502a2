"""Texts: where they come from, and how they become fixed tensors of tokens."""
