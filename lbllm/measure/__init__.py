"""Measuring: perplexity, tasks, estimates, and the preview of one block."""
