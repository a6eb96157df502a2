"""The parts of the page Quantize."""
