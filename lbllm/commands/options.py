"""Options that several commands share, and the settings that those of a run add up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from lbllm.config import TO_ACTIVATIONS, RunConfig, make_config, read_settings
from lbllm.presets import PRESETS

DEFAULT_MODEL = "smollm2-135m-instruct"

TeacherOption = Annotated[
    str | None,
    typer.Option("--model", "-m", help=f"Catalogue id, hub id, folder or .gguf file. \\[default: {DEFAULT_MODEL}]"),
]
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="A teacher (catalogue id, hub id, folder, .gguf file) or a packed checkpoint."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PresetOption = Annotated[str | None, typer.Option(help=f"Starting point: {', '.join(PRESETS)}. \\[default: quick]")]
GroupSizeOption = Annotated[int | None, typer.Option(help="Weights that share a set of levels; -1: a whole row.")]
FormatOption = Annotated[str | None, typer.Option("--format", help="w1+1, or w1 (signs only).")]
ActBitsOption = Annotated[int | None, typer.Option(help="Bits of activations: 4, 8 or 16.")]
KvBitsOption = Annotated[int | None, typer.Option(help="Bits of the KV cache: 4, 8 or 16.")]
CorpusOption = Annotated[str | None, typer.Option(help="Catalogue id or path of the text to train on.")]
RunDeviceOption = Annotated[str | None, typer.Option("--device", help="auto, cpu or cuda.")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. wat.epochs=4. Repeatable.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="JSON file of settings, as a run's config.json.")]
HostOption = Annotated[
    str, typer.Option(envvar="LBLLM_HOST", help="Address to listen on; 0.0.0.0: every address, so the network, too.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, as `runs list` shows it.")]
FromOption = Annotated[
    str | None,
    typer.Option(
        "--from",
        metavar="CHECKPOINT",
        help="Train a packed checkpoint further, by stage 4 alone: its folder, a finished run's id, or 'shipped'. It "
        "brings model and format along. With --act-bits or --kv-bits, where it has 16, stage 3 comes before.",
    ),
]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="New folder for the packed checkpoint.")]
TextOption = Annotated[str, typer.Option("--text", help="wikitext2, a text file, or a catalogue text (held-out part).")]
SeqLenOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window. \\[default: 2048, or the model's context if shorter]")
]
IgnoreMemoryOption = Annotated[bool, typer.Option("--ignore-memory", help="Start even if memory seems too small.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use the first N windows, or questions of a task, only.")]


def run_config(
    model: str | None = None,
    preset: str | None = None,
    group_size: int | None = None,
    weight_format: str | None = None,
    act_bits: int | None = None,
    kv_bits: int | None = None,
    corpus: str | None = None,
    device: str | None = None,
    assignments: list[str] | None = None,
    file: Path | None = None,
    start: str | None = None,
) -> RunConfig:
    """The preset, changed by the settings file, then by the options, then by --set. Raises ConfigError, and RunError or
    CheckpointError where ``start`` is no checkpoint."""
    named, document = read_settings(file.read_bytes(), str(file)) if file is not None else (None, {})
    if start is not None:
        from lbllm.pipeline.start import settings_to_go_on

        document |= settings_to_go_on(start)
    base = preset or named or "quick"
    options = {
        "model": model,
        "corpus": corpus,
        "device": device,
        "quant.group_size": group_size,
        "quant.format": weight_format,
        "quant.act_bits": act_bits,
        "quant.kv_bits": kv_bits,
    }
    given = [f"{key}={json.dumps(value)}" for key, value in options.items() if value is not None]
    given += assignments or []
    config = make_config(base, document, tuple(given))
    if start is not None and any(
        getattr(config.quant, key) != document["quant"][key] for key in ("act_bits", "kv_bits")
    ):
        return make_config(base, document | {"stages": list(TO_ACTIVATIONS)}, tuple(given))
    return config
