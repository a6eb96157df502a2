"""Write a folder that runs as a Hugging Face Space: the showcase of one checkpoint and its teacher.

The Space contains lbllm's own source, so that it installs only the public packages in its requirements.txt:

    README.md         the Space's settings and what it shows
    app.py            starts the showcase
    requirements.txt  the packages that a showcase needs, in the versions that are installed here
    packages.txt      the compiler for its kernels
    lbllm/, app/, assets/, with LICENSE and NOTICE
    checkpoint/       unless the Space downloads it from the hub
    teacher/          if the teacher is a folder or a GGUF file here; otherwise the Space downloads it
"""

from __future__ import annotations

import json
import shutil
from importlib import metadata
from pathlib import Path

from transformers.utils.hub import CHAT_TEMPLATE_DIR

from lbllm.checkpoints.find import find_checkpoint, find_teacher, teacher_of
from lbllm.checkpoints.hf import is_checkpoint
from lbllm.checkpoints.record import copy_public, provenance, read_record
from lbllm.checkpoints.seal import packed_weights
from lbllm.errors import CheckpointError, ConfigError, LbllmError, ModelError, ResourceError
from lbllm.extras import installation
from lbllm.files import new_folder, refuse_links, write_errors
from lbllm.models.catalogue import HUB_ID, HUB_LICENCES, model_title
from lbllm.models.gguf_parts import all_parts
from lbllm.models.source import hub_id as hub_id_of
from lbllm.places import APP, ASSETS, BUNDLE
from lbllm.templates import environment

PYTHON = "3.11"
_PACKAGE = Path(__file__).resolve().parent.parent
# The packages that a showcase imports; gradio installs the rest.
_NEEDED = (
    "accelerate",
    "gguf",
    "gradio",
    "jinja2",
    "numpy",
    "protobuf",
    "psutil",
    "pydantic",
    "rich",
    "safetensors",
    "sentencepiece",
    "torch",
    "transformers",
    "typer",
)
_TEACHER = "teacher"
_LICENCE_FILES = ("LICENSE", "NOTICE")
_MODEL_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "README.md", "LICENSE*", CHAT_TEMPLATE_DIR)
_TEMPLATES = environment(__file__)


def write_space(
    checkpoint: Path, out: Path, *, teacher: str | None = None, hub_id: str | None = None, title: str = "LBLLM Showcase"
) -> None:
    """Write the Space of a packed checkpoint to the new or empty folder ``out``.

    ``teacher``: catalogue id, hub id, model folder or GGUF file (default: what ``teacher_of`` gives).
    ``hub_id``: the checkpoint's repository on the hub, which the Space then downloads; without it the folder contains
    the checkpoint. Raises CheckpointError, ModelError, ConfigError, ResourceError.
    """
    if not is_checkpoint(checkpoint):
        raise CheckpointError(f"{checkpoint} is not a packed checkpoint; give the folder that a run wrote")
    packed_weights(checkpoint)
    if hub_id is not None and not HUB_ID.fullmatch(hub_id):
        raise ConfigError(f"{hub_id!r} is not a hub id; give owner/name")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ResourceError(f"{out} exists already; give a new folder")
    if not (APP / "showcase" / "page.py").is_file():
        raise ResourceError(f"the showcase's page is not at {APP}; install lbllm again")
    teacher = teacher or teacher_of(find_checkpoint(str(checkpoint.absolute())))
    requirements = _requirements()
    with write_errors(out), new_folder(out) as folder:
        named = _put_teacher(teacher, folder)
        if hub_id is None:
            (folder / "checkpoint").mkdir()
            copy_public(checkpoint, read_record(checkpoint), folder / "checkpoint")
        _put_source(folder)
        readme = _readme(checkpoint, teacher, hub_id, title, provenance(checkpoint).get("licence", ""), requirements)
        # The hub requires a mark on large files.
        lfs = "filter=lfs diff=lfs merge=lfs -text"
        for name, text in {
            "README.md": readme,
            "app.py": _app(hub_id, named),
            "requirements.txt": "\n".join(requirements) + "\n",
            # Debian packages: without a compiler the packed layers run expanded.
            "packages.txt": "g++\n",
            ".gitattributes": f"*.safetensors {lfs}\n*.gguf {lfs}\n",
        }.items():
            (folder / name).write_text(text)


def _put_teacher(name: str, out: Path) -> str:
    """Copy the teacher's files, if they are here; return its path in the Space, or the name to load it by."""
    try:
        source = find_teacher(name)
    except LbllmError as error:
        raise ModelError(f"the Space's teacher: {error}") from None
    place = Path(source.place)
    if source.kind == "folder":
        target = out / _TEACHER / place.resolve().name
        refuse_links(place)
        ignored = {path.name for path in place.iterdir() if not any(path.match(kind) for kind in _MODEL_FILES)}
        shutil.copytree(place, target, ignore=lambda folder, names: ignored & set(names))
        return target.relative_to(out).as_posix()
    if source.kind in ("embedded", "gguf"):
        # The showcase shows the name of its file.
        target = out / _TEACHER / (f"{model_title(name)}.gguf" if source.kind == "embedded" else place.name)
        target.parent.mkdir()
        parts = all_parts(place)
        if len(parts) > 1:  # a model in several files is found by any of them
            target = target.with_name(parts[0].name)
        for part in parts:
            shutil.copyfile(part, target if part == parts[0] else target.with_name(part.name))
        return target.relative_to(out).as_posix()
    return name


def _put_source(out: Path) -> None:
    """Copy the engine, the showcase's page, the assets that they read, and the licence."""
    shutil.copytree(_PACKAGE, out / "lbllm", ignore=shutil.ignore_patterns("__pycache__", "_bundle"))
    (out / "app").mkdir()
    shutil.copyfile(APP / "__init__.py", out / "app" / "__init__.py")
    shutil.copytree(APP / "showcase", out / "app" / "showcase", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ASSETS / "theme", out / "assets" / "theme")
    shutil.copyfile(ASSETS / "prompts.json", out / "assets" / "prompts.json")
    for file in _licence_files():
        shutil.copyfile(file, out / file.name)


def _licence_files() -> list[Path]:
    """LICENSE and NOTICE: in a checkout they are beside this package, an installed one has them in its metadata."""
    found = [BUNDLE / name for name in _LICENCE_FILES if (BUNDLE / name).is_file()]
    if found:
        return found
    try:
        installed = metadata.files("lbllm") or []
    except metadata.PackageNotFoundError:
        return []
    return [
        Path(str(file.locate()))
        for file in installed
        if file.parts[0].endswith(".dist-info") and file.name in _LICENCE_FILES
    ]


def _requirements() -> list[str]:
    """The packages that a showcase needs, in the versions that are installed here. Raises ResourceError if one is
    missing."""
    try:
        return [f"{name}=={metadata.version(name).partition('+')[0]}" for name in _NEEDED]
    except metadata.PackageNotFoundError as error:
        raise ResourceError(
            f"a Space needs the package {error.name}, in the version that it will install: "
            f"{installation('showcase', 'gguf')}"
        ) from None


def _app(hub_id: str | None, teacher: str) -> str:
    """The text of app.py."""
    return _TEMPLATES.get_template("space_app.py.jinja").render(
        hub_id=hub_id, teacher=teacher, teacher_is_here=teacher.startswith(f"{_TEACHER}/")
    )


def _readme(
    checkpoint: Path, teacher: str, hub_id: str | None, title: str, licence: str, requirements: list[str]
) -> str:
    """The text of README.md: the settings of the Space as front matter, then what it shows."""
    models = [name for name in (hub_id_of(teacher), hub_id) if name]
    known = HUB_LICENCES.get(licence.lower())
    settings: dict[str, object] = {
        "title": title,
        "emoji": "⚖️",
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": next(line for line in requirements if line.startswith("gradio==")).partition("==")[2],
        "python_version": PYTHON,
        "app_file": "app.py",
        "models": models,
        "license": known or "other",
        "short_description": "A binarized model beside its teacher",
    }
    if known is None:
        settings["license_name"] = licence or "not stated"
    stated = json.loads((checkpoint / "config.json").read_text())["quantization_config"]
    return _TEMPLATES.get_template("space_readme.md.jinja").render(
        settings=settings, title=title, teacher=model_title(teacher), bpw=stated["bpw"]
    )
