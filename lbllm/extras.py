"""Optional dependencies: pages, server, zero-shot tasks, hub texts and GGUF files need them, all else works without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

from lbllm.errors import ResourceError

Extra = Literal["app", "showcase", "serve", "eval", "gguf"]
# The modules that each extra of pyproject.toml brings.
MODULES: dict[Extra, tuple[str, ...]] = {
    "app": ("streamlit", "plotly", "pandas"),
    "showcase": ("gradio",),
    "serve": ("starlette", "uvicorn"),
    "eval": ("lm_eval", "datasets"),
    "gguf": ("gguf", "sentencepiece", "google"),
}


@contextmanager
def extra(name: Extra, purpose: str) -> Iterator[None]:
    """Import optional modules inside. Raises ResourceError, naming the extra, where one is not installed.

    ``purpose`` is what needs it, as the subject of a sentence: "the workbench".
    """
    try:
        yield
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in MODULES[name]:
            raise
        raise ResourceError(f"{purpose} needs the package {missing}: {installation(name)}") from None


def installation(*names: Extra) -> str:
    """The commands that install extras."""
    extras = ",".join(names)
    return f"pip install 'lbllm[{extras}]' (in a folder with the source of lbllm: pip install '.[{extras}]')"
