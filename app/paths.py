"""Paths that come from a page: all below one folder, LBLLM_ROOT or the current one.

The command line opens what its user names. A page may be open in a browser that shows other people's pages too, so what
it names is looked for under the root alone, symbolic links resolved.
"""

from __future__ import annotations

from pathlib import Path

from lbllm.errors import ConfigError
from lbllm.models.catalogue import HUB_ID, MODELS
from lbllm.places import root
from lbllm.texts.catalogue import TEXTS


def resolve_under_root(text: str) -> Path:
    """The absolute path that ``text`` means, relative ones beginning at the root. It need not exist.

    Raises ConfigError where it lies outside the root, or leaves it by a symbolic link or "..".
    """
    allowed = root()
    try:
        path = (allowed / Path(text.strip()).expanduser()).resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"path {text!r} can't be read ({error})") from None
    if not path.is_relative_to(allowed):
        raise ConfigError(
            f"{text} lies outside {allowed}, the folder that pages may read; move it there, or start the workbench "
            "with LBLLM_ROOT set to a folder that holds it"
        )
    return path


def model_name(text: str) -> str:
    """What a page calls a model, as the engine takes it: catalogue ids and hub ids as they are, paths resolved.

    Raises ConfigError for paths outside the root.
    """
    name = text.strip()
    if any(entry.id == name.lower() for entry in MODELS):
        return name
    # A folder of the current directory would win over the hub: only one under the root may.
    if HUB_ID.fullmatch(name) and not (root() / name).exists() and not Path(name).exists():
        return name
    return _existing(name, "model")


def corpus_name(text: str) -> str:
    """The same for texts: catalogue ids, also several joined by "+", as they are; a path resolved."""
    name = text.strip()
    ids = {entry.id for entry in TEXTS}
    return name if set(name.split("+")) <= ids else _existing(name, "text")


def _existing(name: str, what: str) -> str:
    if not name:
        raise ConfigError(f"no {what} is chosen")
    path = resolve_under_root(name)
    if not path.exists():
        raise ConfigError(
            f"{what} {name!r} is neither known nor a path under {root()}; choose one from the list, or give a "
            f"{'hub id (owner/name), a folder or a .gguf file' if what == 'model' else '.txt or .jsonl file or folder'}"
        )
    return str(path)
