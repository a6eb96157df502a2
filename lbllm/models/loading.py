"""Around every call that builds, loads or saves a model: no progress bars and reports of transformers, one thread at a
time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from transformers.utils import logging

# While transformers builds a model it replaces functions of its own classes, tie_weights among them, and puts them back
# after. Two threads at once put back each other's replacements: from then on no model in the process is tied.
_ONE_AT_A_TIME = threading.RLock()


@contextmanager
def quiet() -> Iterator[None]:
    """Other threads wait. Progress bars and warnings are off inside and as they were afterwards: the engine's caller
    shows progress, and what matters of a report becomes an error of ours."""
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
