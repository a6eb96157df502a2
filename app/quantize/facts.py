"""What the Quantize page knows before a run: the parts of the model, and the size, memory and time of the settings."""

from __future__ import annotations

import threading
from concurrent.futures import Future

import streamlit as st
from transformers import PreTrainedModel

from app.view import COLOURS, count_text, plain, sentence, size_text, time_text
from lbllm.config import RunConfig
from lbllm.errors import LbllmError
from lbllm.labels import BINARIZED_BITS
from lbllm.machine import fastest_matmul_rate, free_memory
from lbllm.measure.estimate import Estimate, estimate
from lbllm.measure.experts_share import experts_sentence
from lbllm.models.blocks import decoder_blocks, linear_layers
from lbllm.models.catalogue import MODELS
from lbllm.models.teacher import ModelSummary, skeleton, summary
from lbllm.sections import stage_number
from lbllm.templates import environment
from lbllm.units import against_16_bits

_TEMPLATES = environment(__file__)
PART_NAMES = {
    "bits": "sign bits",
    "bitmap": "bitmap",
    "parameters": "parameters",
    "embeddings": "embeddings",
    "output head": "output head",
    "other": "norms and other",
}


Known = tuple[ModelSummary, PreTrainedModel]


@st.cache_resource(max_entries=4, ttl=300, show_spinner=False)
def _reading(name: str) -> Future[Known | str]:
    """A model that is read in a thread of its own, because reading waits while another model is being loaded."""
    found: Future[Known | str] = Future()

    def read() -> None:
        try:
            found.set_result((summary(name), skeleton(name)))
        except LbllmError as error:
            found.set_result(str(error))
        except BaseException as error:
            found.set_exception(error)

    threading.Thread(target=read, name="lbllm-model-facts", daemon=True).start()
    return found


def model_facts(name: str, seconds: float = 1.0) -> Known | str | None:
    """The model's summary and its skeleton, or the reason why they can't be read; None if they aren't known within
    ``seconds``. They are kept, so that sliders don't wait for them."""
    try:
        return _reading(name).result(seconds)
    except TimeoutError:
        return None


@st.fragment(run_every=0.5)
def await_facts(name: str) -> None:
    """Say that the model is being read, and draw the page again when it is known."""
    if model_facts(name, 0.0) is not None:
        st.rerun()
    st.caption(
        ":material/hourglass_empty: Reading the model's description. It waits while another model is being loaded; "
        "you can already choose."
    )


@st.cache_resource(ttl=600, show_spinner="Measuring this machine")
def rate(device: str) -> float:
    """The device's matmul rate, measured again every ten minutes."""
    return fastest_matmul_rate(device)


def layer_names(model: PreTrainedModel) -> list[str]:
    """The full names of the layers that can be binarized."""
    path, blocks = decoder_blocks(model)
    return [f"{path}.{number}.{name}" for number, block in enumerate(blocks) for name in linear_layers(block)]


def estimated(config: RunConfig, model: PreTrainedModel) -> Estimate:
    """The estimate for a config and a known model. Raises ConfigError, ModelError."""
    return estimate(config, model=model, rate=rate(config.device))


def show_model(facts: ModelSummary) -> None:
    """Show a model's size, and which parts will be binarized and which stay."""
    kept = ", ".join(f"{part} {count_text(count)}" for part, count in facts.kept.items())
    context = f"context {facts.context_length:,}, " if facts.context_length else ""
    st.markdown(
        f"**{count_text(facts.parameters)} parameters** in {facts.blocks} blocks. "
        f"**{count_text(facts.binarized)}** of them, the weights of {facts.layers} linear layers, **will be "
        f"binarized**; {count_text(facts.parameters - facts.binarized)} stay ({kept})."
    )
    if facts.experts:
        st.markdown(
            f"A mixture: **{facts.experts} experts** in a block, which hold {count_text(facts.expert_weights)} of the "
            "binarized weights. Each token is computed by a few of them; the routers that choose stay dense."
        )
    chat = "chat template" if facts.chat_template else "no chat template: completes text"
    st.caption(plain(f"{facts.architecture}, {context}{chat}. Licence: {facts.licence}"))


def show_unknown(name: str, message: str) -> None:
    """Show why a model can't be read, and what the catalogue knows about it."""
    st.error(sentence(message))
    entry = next((entry for entry in MODELS if entry.id == name), None)
    if entry is not None:
        note = f" {entry.note}." if entry.note else ""
        st.caption(plain(f"{count_text(entry.parameters)} parameters. Licence: {entry.licence}.{note}"))


def _cache_words(result: Estimate) -> str:
    cache = result.cache
    if cache is None:
        return ""
    return (
        f" In a chat the KV cache of {cache.tokens:,} tokens takes {size_text(cache.nbytes)}, {cache.bits:.2f} bits "
        "for each key or value, with their ranges and with what stays in 16 bits."
    )


def show_figures(config: RunConfig, result: Estimate) -> None:
    """Show bits, disk, memory and time as large numbers."""
    stages = {stage_number(stage): seconds for stage, seconds in result.stage_seconds.items()}
    longest = max(stages, key=stages.__getitem__)
    parts = [f"stage {number}: {time_text(seconds)}" for number, seconds in stages.items()]
    parts += [f"{name}: {time_text(seconds)}" for name, seconds in result.other_seconds.items()]
    shown = (
        (
            BINARIZED_BITS[0].upper() + BINARIZED_BITS[1:],
            f"{result.bpw:.2f}",
            "parameters included",
            "All stored bits of the binarized layers, those of the group parameters included, divided by the number of "
            "their weights. Embeddings and output head have the bits chosen for them, norms and all else 16.",
        ),
        (
            "On disk",
            size_text(result.disk_bytes),
            f"in 16 bits: {size_text(_in_16_bits(result))}",
            f"The whole file, {against_16_bits(result.disk_bytes, result.parameters)}, embeddings included."
            + _cache_words(result),
        ),
        (
            "Memory of the run",
            size_text(result.memory_bytes),
            f"free now: {size_text(free_memory(config.device))}",
            "At its peak. One block of the model is in memory at a time; the hidden states of all tokens lie "
            + ("in files on disk, because memory is short. " if result.needs.streams == "disk" else "in memory. ")
            + f"The run's files take {size_text(sum(result.needs.disk.values()))} of disk space. Most of the memory: "
            + ", ".join(
                f"{name} {size_text(size)}"
                for name, size in sorted(result.memory_parts.items(), key=lambda item: -item[1])[:3]
            ),
        ),
        (
            "Estimated time",
            time_text(result.seconds),
            f"mostly stage {longest}" if len(stages) > 1 else f"only stage {longest}",
            f"From the speed of matrix products on this machine now. {', '.join(parts)}. After the run's first block, "
            "Runs shows the time left from what that block took.",
        ),
    )
    for column, (label, value, small, explained) in zip(st.columns(4, vertical_alignment="bottom"), shown, strict=True):
        column.metric(label, value, small, delta_color="off", delta_arrow="off", help=explained or None)


def show_experts(result: Estimate) -> None:
    """Show what the experts of a mixture take of bits, size and time."""
    said = experts_sentence(result)
    if said:
        st.caption(f"**Experts:** {said}")


def bar(result: Estimate) -> str:
    """The parts of the checkpoint at full width, and below them its size compared with 16 bits, as HTML."""
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
                # A letter takes a little more than one percent of the narrowest bar, 600 pixels.
                "fits": share > 1.3 * len(name) + 1,
            }
        )
    return _TEMPLATES.get_template("bar.html.jinja").render(
        label=", ".join(f"{PART_NAMES[part]} {size_text(size)}" for part, size in parts.items()),
        segments=segments,
        percent=min(100 * result.disk_bytes / _in_16_bits(result), 100),
        scale_colour=COLOURS["bits"],
        against=against_16_bits(result.disk_bytes, result.parameters),
        in_16_bits=size_text(_in_16_bits(result)),
    )


def _in_16_bits(result: Estimate) -> int:
    return 2 * result.parameters
