"""The export of a finished run: choose a kind and a folder, write it, see where it is."""

from __future__ import annotations

import re

import streamlit as st

from app.paths import resolve_under_root
from app.view import guard, path_text, sentence, size_text
from lbllm.checkpoints.find import find_checkpoint
from lbllm.errors import LbllmError
from lbllm.places import root
from lbllm.runs.store import Run, RunStore
from lbllm.share.export import Exported, ExportKind, export
from lbllm.share.gguf_names import TYPES_HELP, GgufType, type_name
from lbllm.share.gguf_size import gguf_sizes

KINDS: dict[ExportKind, tuple[str, str]] = {
    "packed": ("Packed", "As it is: bits and levels, for transformers with this program installed."),
    "dense": ("Dense", "bfloat16 weights for any program that loads transformers folders; answers like the A16 model."),
    "gguf": (
        "GGUF",
        "One file for llama.cpp, with a Modelfile for Ollama; answers like the A16 model.",
    ),
    "space": ("Space", "The showcase, both models in it, as a Gradio app for Hugging Face Spaces or any machine."),
}


def show_export(runs: RunStore, run: Run) -> None:
    """The section, folded; nothing before the run is done."""
    if run.state == "done":
        with st.expander("Export", icon=":material/ios_share:"):
            st.fragment(_section)(runs, run)


def _section(runs: RunStore, run: Run) -> None:
    kind: ExportKind = st.radio(
        "What",
        list(KINDS),
        format_func=lambda kind: KINDS[kind][0],
        captions=[caption for _, caption in KINDS.values()],
        key=f"export kind {run.id}",
        horizontal=True,
    )
    gguf_type = _choose_type(run) if kind == "gguf" else None
    place, press = st.columns([5, 1], vertical_alignment="bottom")
    name = re.sub(r"[^a-z0-9]+", "-", run.name.lower()).strip("-") or "run"
    folder = place.text_input(
        "New folder",
        f"exports/{name}-{kind}",
        key=f"export folder {run.id} {kind}",
        help=f"Under {root()}. Its README.md describes it, for a model as a model card.",
    )
    outcome = f"export outcome {run.id}"
    below = st.empty()  # one place, so that the last outcome goes when the next export begins
    with guard(), below:
        if press.button("Export", key=f"export {run.id}", type="primary", width="stretch"):
            with st.spinner("Writing; a model of 135M parameters takes seconds"):
                st.session_state[outcome] = _try_export(runs, run, kind, folder, gguf_type)
            st.rerun()
        result = st.session_state.get(outcome)
        if isinstance(result, Exported):
            label, readme = KINDS[result.kind][0], "README" if result.kind == "space" else "model card"
            st.success(f"{label}: {size_text(result.disk_bytes)} with its {readme}, in {path_text(result.path)}")
        elif result is not None:
            st.error(result)


def _choose_type(run: Run) -> GgufType | None:
    """The type of the weights, of those that the checkpoint's rows allow, each with the size of its file."""
    with guard():
        sizes = gguf_sizes(run.folder / "checkpoint")
        return st.selectbox(
            "Type of the weights",
            list(sizes),
            format_func=lambda kind: f"{type_name(kind)}, {size_text(sizes[kind])}",
            key=f"export type {run.id}",
            help=TYPES_HELP,
        )
    return None


def _try_export(runs: RunStore, run: Run, kind: ExportKind, folder: str, gguf_type: GgufType | None) -> Exported | str:
    """What was written, or why nothing was, as a sentence."""
    try:
        return export(find_checkpoint(str(run.folder), runs), kind, resolve_under_root(folder), gguf_type=gguf_type)
    except LbllmError as error:
        return sentence(error)
