"""Options that several commands share, and how a run's options become its settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lbllm.config import (
    DEFAULT_MODEL,
    DEFAULT_PRESET,
    OPTIONS,
    SETTINGS,
    TO_ACTIVATIONS,
    RunConfig,
    make_config,
    read_settings_file,
)
from lbllm.fields import allowed, choices
from lbllm.sections import ACTIVATION_BITS


def _sets(path: str, *names: str, default: str = "", metavar: str | None = None) -> Any:
    """The option that sets a setting, with the setting's own help; ``names``: further names of the option."""
    field = SETTINGS[path]
    values = f" Values: {allowed(field)}." if choices(field) else ""
    note = f" \\[default: {default}]" if default else ""
    return typer.Option(OPTIONS[path], *names, metavar=metavar, help=f"{field.description}{values}{note}")


TeacherOption = Annotated[str | None, _sets("model", "-m", default=DEFAULT_MODEL)]
ModelOption = Annotated[
    str,
    typer.Option("--model", "-m", help="A teacher (catalogue id, hub id, folder, .gguf file) or a packed checkpoint."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
PresetOption = Annotated[str | None, _sets("preset", default=DEFAULT_PRESET)]
GroupSizeOption = Annotated[int | None, _sets("quant.group_size")]
FormatOption = Annotated[str | None, _sets("quant.format")]
ActBitsOption = Annotated[int | None, _sets("quant.act_bits")]
KvBitsOption = Annotated[int | None, _sets("quant.kv_bits")]
CorpusOption = Annotated[str | None, _sets("corpus")]
RunDeviceOption = Annotated[str | None, _sets("device")]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting, e.g. wat.epochs=4. Repeatable.")
]
ConfigOption = Annotated[Path | None, typer.Option("--config", help="JSON file of settings, as a run's config.json.")]
HostOption = Annotated[
    str, typer.Option(envvar="LBLLM_HOST", help="Address to listen on; 0.0.0.0: every address, so also the network.")
]
RunArgument = Annotated[str, typer.Argument(metavar="RUN", help="Id of a run, as `runs list` shows it.")]
FromOption = Annotated[str | None, _sets("start", metavar="CHECKPOINT")]
OutOption = Annotated[Path, typer.Option("--out", "-o", help="New folder for the packed checkpoint.")]
TextOption = Annotated[str, typer.Option("--text", help="wikitext2, a text file, or a catalogue text (held-out part).")]
SeqLenOption = Annotated[
    int | None, typer.Option(min=2, help="Tokens in a window. \\[default: 2048, or the model's context if shorter]")
]
ProcessesOption = Annotated[
    int | None,
    typer.Option(
        min=1, help="Share the work among this many processes, each on a GPU of its own where the run is on GPUs."
    ),
]
IgnoreMemoryOption = Annotated[bool, typer.Option("--ignore-memory", help="Start even if memory seems too small.")]
LimitOption = Annotated[
    int | None, typer.Option(min=1, help="Use the first N windows only, or N questions of a task, drawn at random.")
]


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
    CheckpointError if ``start`` is not a checkpoint."""
    named, document = read_settings_file(file) if file is not None else (None, {})
    if start is not None:
        from lbllm.pipeline.start import settings_to_go_on

        document |= settings_to_go_on(start)
    base = preset or named or DEFAULT_PRESET
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
    if start is not None and any(getattr(config.quant, bits) != document["quant"][bits] for bits in ACTIVATION_BITS):
        return make_config(base, document | {"stages": list(TO_ACTIVATIONS)}, tuple(given))
    return config
