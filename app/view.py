"""Shared by all pages: colours, readable numbers, the run store, and a guard that shows errors as messages.

The colours are those of Okabe and Ito, which colour-blind people can distinguish; each is legible on light and dark.
"""

from __future__ import annotations

import re
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import streamlit as st

from lbllm.chat.pool import ModelPool
from lbllm.config import labels_alone
from lbllm.errors import LbllmError
from lbllm.places import ASSETS, home
from lbllm.runs.store import RunStore
from lbllm.units import number_text as number_text
from lbllm.units import size as size_words

THEME = ASSETS / "theme"

COLOURS: dict[str, str] = {
    "teacher": "#5B6B7B",
    "student": "#0072B2",
    "ptq": "#E69F00",
    "wat": "#0072B2",
    "aar": "#009E73",
    "e2e": "#CC79A7",
    "bad": "#D55E00",
    "bits": "#0072B2",
    "bitmap": "#56B4E9",
    "planes": "#332288",
    "parameters": "#E69F00",
    "embeddings": "#8796A5",
    "output head": "#CC79A7",
    "other": "#5B6B7B",
}


def size_text(size: float) -> str:
    """Return a size in bytes as text, in decimal units: 40.2 MB."""
    return f"{size:.0f} bytes" if size < 1000 else size_words(size)


def time_text(seconds: float) -> str:
    """Return seconds as text: 42 s, 6:10 (minutes and seconds), 2 h 05 min, 39 h or 3 d 4 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60}:{whole % 60:02}"
    if whole < 36_000:
        return f"{whole // 3600} h {whole % 3600 // 60:02} min"
    if whole < 2 * 86400:
        return f"{round(whole / 3600)} h"
    return f"{whole // 86400} d {whole % 86400 // 3600} h"


def count_text(count: float) -> str:
    """Return a count as text with three digits: 106M, 1.71B, 8.2k."""
    for unit, factor in (("T", 1e12), ("B", 1e9), ("M", 1e6), ("k", 1e3)):
        if count >= 0.9995 * factor:
            return f"{count / factor:.3g}{unit}"
    return f"{count:.0f}"


def path_text(path: Path | str) -> str:
    """Return a path escaped by ``plain``; a path in the user's home folder begins with ~."""
    path = Path(path)
    own = Path.home()
    return plain(str(Path("~") / path.relative_to(own)) if path.is_relative_to(own) else str(path))


def plain(text: str) -> str:
    """Return text with all Markdown characters escaped; for text that comes from users, models or files."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~$:&])", r"\\\1", text)


def sentence(error: Exception | str) -> str:
    """Return a message of the engine as a sentence for a page, with the settings' labels, escaped by ``plain``."""
    text = labels_alone(str(error))
    first = text.split(" ", 1)[0]
    return plain(text[:1].upper() + text[1:] if first.isalpha() else text)


@contextmanager
def guard() -> Iterator[None]:
    """Show errors in the body of a page or fragment as a message, never as a traceback.

    Unexpected errors are written to a log file, and the message names the file.
    """
    try:
        yield
    except LbllmError as error:
        st.error(sentence(error))
    except Exception as error:
        file = home() / "workbench.log"
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("a") as log:
                log.write(time.strftime("%Y-%m-%d %H:%M:%S\n") + traceback.format_exc() + "\n")
            where = f"The details are in {file}."
        except OSError:
            where = f"The details could not be written to {file}."
        st.error(
            plain(f"An unexpected error occurred on this page ({type(error).__name__}: {error}). {where} ")
            + "Reload the page to continue; runs are not affected."
        )


@st.cache_resource
def pool() -> ModelPool:
    """Return the models of this server's process, which all sessions share."""
    return ModelPool()


@st.cache_resource
def _store(root: Path) -> RunStore:
    return RunStore(root)


def store() -> RunStore:
    """Return the run store, which is opened once per process. Raises RunError, ResourceError."""
    opened = _store(home() / "runs")
    said = opened.database.repaired
    if said is not None and st.session_state.get("store repaired") != said:
        st.session_state["store repaired"] = said
        st.warning(plain(said))
    return opened


def checkpoints(store: RunStore) -> dict[str, Path]:
    """Return the packed checkpoints of finished runs, the newest first, by their labels for model pickers."""
    found = {}
    for run in reversed(store.all()):
        folder = run.folder / "checkpoint"
        if run.state == "done" and (folder / "config.json").is_file():
            found[f"{run.name} ({run.id})"] = folder
    return found
