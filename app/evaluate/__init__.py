"""The parts of the page Evaluate."""
