"""The showcase: a Gradio page and its API."""
