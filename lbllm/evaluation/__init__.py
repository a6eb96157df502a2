"""Evaluations: models measured side by side in a queue, each in a process of its own, with intervals and answers."""
