"""A context for every call that builds, loads or saves a model: one thread at a time, without transformers' output."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

# While transformers builds a model it replaces functions of its own classes, for example tie_weights, and restores them
# afterwards. Two threads at the same time would restore each other's replacements, and then no model in the process
# would have tied weights.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Make other threads wait, and turn off transformers' progress bars and warnings.

    The caller of the engine shows progress, and the engine reports the important problems as errors.
    """
    with _ONE_AT_A_TIME:
        shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if shown:
                logging.enable_progress_bar()
