"""Paths that come from a page: all below one folder, LBLLM_ROOT or the current one.

The command line opens what its user names. A page may be open in a browser that also shows foreign pages, so its
paths are looked up only under the root, with symbolic links resolved.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lbllm.checkpoints.find import ALONE, FoundCheckpoint, find_model, find_teacher
from lbllm.config import SHIPPED
from lbllm.errors import ConfigError, ModelError
from lbllm.models.catalogue import MODELS
from lbllm.models.source import ModelSource
from lbllm.places import home, root
from lbllm.runs.store import Run
from lbllm.texts.catalogue import TEXTS


def resolve_under_root(text: str) -> Path:
    """The absolute path that ``text`` means, relative ones beginning at the root. It need not exist.

    Raises ConfigError if it lies outside the root, or leaves it by a symbolic link or "..".
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
    """A model name from a page, as the engine takes it: ``shipped``, catalogue ids and hub ids as they are, the folder
    of its checkpoint for a run's id, paths resolved.

    Raises ConfigError for paths outside the root, and what ``find_model`` raises.
    """
    name = text.strip()
    if not name.endswith(ALONE):
        return _model(name, find_model)
    alone = f"{_model(name.removesuffix(ALONE), find_model)}{ALONE}"
    find_model(alone)
    return alone


def teacher_name(text: str) -> str:
    """The same, but only for a teacher, with the errors of ``find_teacher``."""
    return _model(text, find_teacher)


def start_name(text: str) -> str:
    """The same for the checkpoint that a run starts from; one in a run's folder, as the page itself names it, is as
    good as the run's id."""
    path = Path(text.strip())
    if path.name == "checkpoint" and path.parent.parent == (home() / "runs").resolve():
        return model_name(path.parent.name)
    return model_name(text)


def _model(text: str, find: Callable[[str], ModelSource | FoundCheckpoint]) -> str:
    name = text.strip()
    if not name:
        raise ConfigError("no model is chosen")
    if name == SHIPPED or any(entry.id == name.lower() for entry in MODELS):
        find(name)
        return name
    path = resolve_under_root(name)
    if path.exists():
        found = find(str(path))
        # In a run's folder the checkpoint may be a link that leaves the root.
        return str(resolve_under_root(str(found.folder)) if isinstance(found, FoundCheckpoint) else path)
    # A path of the current directory would win over a hub id or a run's id: only one under the root may.
    if Path(name).exists():
        raise ConfigError(f"model {name!r} is neither known nor a path under {root()}")
    try:
        found = find(name)
    except ModelError as error:
        raise ConfigError(f"{error}. A page looks for paths under {root()}") from None
    return str(found.folder) if isinstance(found, FoundCheckpoint) else name


def corpus_name(text: str) -> str:
    """The same for texts: catalogue ids, also several joined by "+", as they are; a path resolved."""
    name = text.strip()
    ids = {entry.id for entry in TEXTS}
    if set(name.split("+")) <= ids:
        return name
    if not name:
        raise ConfigError("no text is chosen")
    path = resolve_under_root(name)
    if not path.exists():
        raise ConfigError(
            f"text {name!r} is neither known nor a path under {root()}; choose one from the list, or give a .txt or "
            ".jsonl file or folder"
        )
    return str(path)


def named_by_run(run: Run, name: str) -> str:
    """A model, text or checkpoint of a run's settings, for a page: a relative path begins where the run was started."""
    known = {SHIPPED, *(entry.id for entry in MODELS), *(entry.id for entry in TEXTS)}
    relative = name.lower() not in known and not Path(name).is_absolute()
    return str(run.cwd / name) if relative and (run.cwd / name).exists() else name
