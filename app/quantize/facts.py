"""What the Quantize page knows beforehand: what a model is made of, and what the settings give and take."""

from __future__ import annotations

import streamlit as st
from transformers import PreTrainedModel

from app.view import COLOURS, count_text, plain, sentence, size_text, time_text
from lbllm.config import RunConfig
from lbllm.errors import LbllmError
from lbllm.machine import fastest_matmul_rate, free_memory
from lbllm.measure.estimate import Estimate, estimate
from lbllm.models.blocks import decoder_blocks, linear_layers
from lbllm.models.catalogue import MODELS
from lbllm.models.teacher import ModelSummary, skeleton, summary
from lbllm.sections import stage_number
from lbllm.templates import environment

_TEMPLATES = environment(__file__)
PART_NAMES = {
    "bits": "sign bits",
    "bitmap": "bitmap",
    "parameters": "parameters",
    "embeddings": "embeddings",
    "output head": "output head",
    "other": "norms and other",
}


@st.cache_resource(max_entries=4, ttl=300, show_spinner="Reading the model's description")
def model_facts(name: str) -> tuple[ModelSummary, PreTrainedModel] | str:
    """The model's summary and its skeleton, or why there are none. Kept for a while, so that no slider waits for
    them."""
    try:
        return summary(name), skeleton(name)
    except LbllmError as error:
        return str(error)


@st.cache_resource(ttl=600, show_spinner="Measuring this machine")
def rate(device: str) -> float:
    """The device's matmul rate, measured now and then."""
    return fastest_matmul_rate(device)


def layer_names(model: PreTrainedModel) -> list[str]:
    """The full names of the layers that can be binarized."""
    path, blocks = decoder_blocks(model)
    return [f"{path}.{number}.{name}" for number, block in enumerate(blocks) for name in linear_layers(block)]


def estimated(config: RunConfig, model: PreTrainedModel) -> Estimate:
    """The estimate of a config for a model that is known. Raises ConfigError, ModelError."""
    return estimate(config, model=model, rate=rate(config.device))


def show_model(facts: ModelSummary) -> None:
    """What a model is, what of it will be binarized and what stays."""
    kept = ", ".join(f"{part} {count_text(count)}" for part, count in facts.kept.items())
    context = f"context {facts.context_length:,}, " if facts.context_length else ""
    st.markdown(
        f"**{count_text(facts.parameters)} parameters** in {facts.blocks} blocks. "
        f"**{count_text(facts.binarized)}** of them, the weights of {facts.layers} linear layers, **will be "
        f"binarized**; {count_text(facts.parameters - facts.binarized)} stay ({kept})."
    )
    chat = "chat template" if facts.chat_template else "no chat template: completes text"
    st.caption(plain(f"{facts.architecture}, {context}{chat}. Licence: {facts.licence}"))


def show_unknown(name: str, message: str) -> None:
    """The same for a model that can't be read: why, and what the catalogue knows."""
    st.error(sentence(message))
    entry = next((entry for entry in MODELS if entry.id == name), None)
    if entry is not None:
        note = f" {entry.note}." if entry.note else ""
        st.caption(plain(f"{count_text(entry.parameters)} parameters. Licence: {entry.licence}.{note}"))


def show_figures(config: RunConfig, result: Estimate) -> None:
    """Bits, disk, memory and time as large numbers, against 16 bits a weight."""
    stages = {stage_number(stage): seconds for stage, seconds in result.stage_seconds.items()}
    longest = max(stages, key=stages.__getitem__)
    shown = (
        (
            "Bits a weight",
            f"{result.bpw:.2f}",
            "fp16: 16",
            "Stored bits of a binarized weight, its share of the group's parameters counted.",
        ),
        ("On disk", size_text(result.disk_bytes), f"fp16: {size_text(result.fp16_bytes)}", ""),
        (
            "Memory of the run",
            size_text(result.memory_bytes),
            f"free now: {size_text(free_memory(config.device))}",
            "At its peak. Most of it: "
            + ", ".join(
                f"{name} {size_text(size)}"
                for name, size in sorted(result.memory_parts.items(), key=lambda item: -item[1])[:3]
            ),
        ),
        (
            "Time here",
            time_text(result.seconds),
            f"mostly stage {longest}" if len(stages) > 1 else f"stage {longest} alone",
            "From the speed of matrix products on this machine now. "
            + ", ".join(f"stage {number}: {time_text(seconds)}" for number, seconds in stages.items()),
        ),
    )
    for column, (label, value, small, explained) in zip(st.columns(4), shown, strict=True):
        column.metric(label, value, small, delta_color="off", delta_arrow="off", help=explained or None)


def bar(result: Estimate) -> str:
    """The checkpoint by part, full width, and below it its length against fp16, as HTML."""
    parts = {name: size for name, size in result.parts.items() if size}
    segments = []
    for part, size in parts.items():
        name, share = PART_NAMES[part], 100 * size / result.disk_bytes
        segments.append(
            {
                "name": name,
                "size": size_text(size),
                "share": share,
                "title": f"{name}: {size_text(size)}, {share:.0f} % of the file",
                "colour": COLOURS[part],
                "ink": "#10202E" if part in ("bitmap", "parameters", "embeddings", "output head") else "#FFFFFF",
                # Of the narrowest bar, 600 pixels, a letter takes one percent and a bit.
                "fits": share > 1.3 * len(name) + 1,
            }
        )
    return _TEMPLATES.get_template("bar.html.jinja").render(
        label=", ".join(f"{PART_NAMES[part]} {size_text(size)}" for part, size in parts.items()),
        segments=segments,
        percent=min(100 * result.disk_bytes / result.fp16_bytes, 100),
        scale_colour=COLOURS["bits"],
        factor=result.fp16_bytes / result.disk_bytes,
        fp16_size=size_text(result.fp16_bytes),
    )
