"""The catalogue of models: their ids, licences and sizes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PureWindowsPath

from lbllm.config import DEFAULT_MODEL

EMBEDDED_PRECISION = "dequantized Q4_1 (embedded copy)"
EMBEDDED_ORIGINAL = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the embedded copy was quantized from this model
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
# The hub's licence identifiers by the licence names of this catalogue, in lower case.
HUB_LICENCES = {
    "apache-2.0": "apache-2.0",
    "mit": "mit",
    "llama 2 community license": "llama2",
    "llama 3.1 community license": "llama3.1",
    "llama 3.2 community license": "llama3.2",
    "gemma terms of use": "gemma",
}


@dataclass(frozen=True)
class ModelEntry:
    """One model of the catalogue. ``hub_id`` is None for the embedded copy; ``parameters`` counts tied weights once."""

    id: str
    hub_id: str | None
    licence: str
    parameters: int
    note: str = ""


_APACHE, _MIT = "Apache-2.0", "MIT"
_LLAMA = "Llama {} Community License"
_LICENCE_ON_HUB = "gated: accept the licence on the hub and log in with `hf auth login`"
_OPT = "OPT-175B License (research only)"

MODELS: tuple[ModelEntry, ...] = (
    ModelEntry(DEFAULT_MODEL, None, _APACHE, 134_515_008, f"{EMBEDDED_PRECISION}; no download"),
    ModelEntry(
        "smollm2-135m-instruct-original",
        EMBEDDED_ORIGINAL,
        _APACHE,
        134_515_008,
        "the bfloat16 weights that the embedded copy was quantized from",
    ),
    ModelEntry("smollm2-135m", "HuggingFaceTB/SmolLM2-135M", _APACHE, 134_515_008),
    ModelEntry("smollm2-360m", "HuggingFaceTB/SmolLM2-360M", _APACHE, 361_821_120),
    ModelEntry("smollm2-360m-instruct", "HuggingFaceTB/SmolLM2-360M-Instruct", _APACHE, 361_821_120),
    ModelEntry("smollm2-1.7b", "HuggingFaceTB/SmolLM2-1.7B", _APACHE, 1_711_376_384),
    ModelEntry("smollm2-1.7b-instruct", "HuggingFaceTB/SmolLM2-1.7B-Instruct", _APACHE, 1_711_376_384),
    ModelEntry("qwen3-0.6b", "Qwen/Qwen3-0.6B", _APACHE, 596_049_920),
    ModelEntry("qwen3-1.7b", "Qwen/Qwen3-1.7B", _APACHE, 1_720_574_976),
    ModelEntry("qwen3-4b", "Qwen/Qwen3-4B", _APACHE, 4_022_468_096),
    ModelEntry("qwen3-8b", "Qwen/Qwen3-8B", _APACHE, 8_190_735_360),
    ModelEntry("qwen2.5-0.5b", "Qwen/Qwen2.5-0.5B", _APACHE, 494_032_768),
    ModelEntry("qwen2.5-1.5b", "Qwen/Qwen2.5-1.5B", _APACHE, 1_543_714_304),
    ModelEntry("llama-3.2-1b", "meta-llama/Llama-3.2-1B", _LLAMA.format("3.2"), 1_235_814_400, _LICENCE_ON_HUB),
    ModelEntry(
        "llama-3.2-1b-instruct",
        "meta-llama/Llama-3.2-1B-Instruct",
        _LLAMA.format("3.2"),
        1_235_814_400,
        _LICENCE_ON_HUB,
    ),
    ModelEntry("llama-3.2-3b", "meta-llama/Llama-3.2-3B", _LLAMA.format("3.2"), 3_212_749_824, _LICENCE_ON_HUB),
    ModelEntry("llama-3.1-8b", "meta-llama/Llama-3.1-8B", _LLAMA.format("3.1"), 8_030_261_248, _LICENCE_ON_HUB),
    ModelEntry("llama-2-7b", "meta-llama/Llama-2-7b-hf", _LLAMA.format("2"), 6_738_415_616, _LICENCE_ON_HUB),
    ModelEntry("tinyllama-1.1b-chat", "TinyLlama/TinyLlama-1.1B-Chat-v1.0", _APACHE, 1_100_048_384),
    ModelEntry("mistral-7b", "mistralai/Mistral-7B-v0.1", _APACHE, 7_241_732_096),
    ModelEntry("gemma-3-270m", "google/gemma-3-270m", "Gemma Terms of Use", 268_098_176, _LICENCE_ON_HUB),
    ModelEntry("gemma-3-270m-it", "google/gemma-3-270m-it", "Gemma Terms of Use", 268_098_176, _LICENCE_ON_HUB),
    ModelEntry("gemma-3-1b", "google/gemma-3-1b-pt", "Gemma Terms of Use", 999_885_952, _LICENCE_ON_HUB),
    ModelEntry("gemma-3-1b-it", "google/gemma-3-1b-it", "Gemma Terms of Use", 999_885_952, _LICENCE_ON_HUB),
    ModelEntry("opt-125m", "facebook/opt-125m", _OPT, 125_239_296),
    ModelEntry("opt-1.3b", "facebook/opt-1.3b", _OPT, 1_315_758_080),
    ModelEntry("opt-6.7b", "facebook/opt-6.7b", _OPT, 6_658_473_984),
    ModelEntry("phi-3-mini-4k-instruct", "microsoft/Phi-3-mini-4k-instruct", _MIT, 3_821_079_552),
    ModelEntry("gpt2", "openai-community/gpt2", _MIT, 124_439_808),
    ModelEntry("pythia-160m", "EleutherAI/pythia-160m", _APACHE, 162_322_944),
    ModelEntry("pythia-410m", "EleutherAI/pythia-410m", _APACHE, 405_334_016),
    ModelEntry("pythia-1.4b", "EleutherAI/pythia-1.4b", _APACHE, 1_414_647_808),
    ModelEntry("olmo-2-1b", "allenai/OLMo-2-0425-1B", _APACHE, 1_484_916_736),
)


def catalogue_hub_id(name: str) -> str | None:
    """Return the hub id of the catalogue model ``name``, or None; for the embedded copy, that of its original."""
    entry = next((entry for entry in MODELS if name.lower() == entry.id or name == entry.hub_id), None)
    return None if entry is None else entry.hub_id or EMBEDDED_ORIGINAL


def last_part(name: str) -> str:
    """Return the last part of a path of any operating system: the only part that other people may see."""
    return PureWindowsPath(name).name or name


def model_title(name: str) -> str:
    """Return a model's name for display: the hub id of a catalogue model, without the owner, or a path's last part."""
    return last_part(catalogue_hub_id(name) or name).removesuffix(".gguf")
