"""Options that several commands share, and the settings that those of a run add up to."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lbllm.config import ACTIVATION_SETTINGS, PRESETS, SHIPPED, TO_ACTIVATIONS, RunConfig, make_config, read_settings

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
        from lbllm.export import find
        from lbllm.runs import RunStore
        from lbllm.start import settings_to_go_on

        document |= settings_to_go_on(start if start == SHIPPED else str(find(start, RunStore()).folder))
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


def arguments(config: RunConfig) -> list[str]:
    """The options that make ``run_config`` give ``config``: its preset, then each setting that differs from it."""
    preset = config.preset if config.preset in PRESETS else "quick"
    plain, given = _leaves(make_config(preset)), _leaves(config)
    options = {
        "model": "--model",
        "quant.format": "--format",
        "quant.group_size": "--group-size",
        "quant.act_bits": "--act-bits",
        "quant.kv_bits": "--kv-bits",
        "corpus": "--corpus",
        "device": "--device",
        "start": "--from",
    }
    words = ["--model", config.model, "--preset", preset]
    if config.start is not None:
        # Stages and format come along with the checkpoint, but for its groups and for bits that are brought down.
        overrides = json.dumps(given["quant.overrides"])
        given = {key: value for key, value in given.items() if key != "stages" and not key.startswith("quant.")}
        words += ["--group-size", str(config.quant.group_size), "--set", f"quant.param_bits={config.quant.param_bits}"]
        if config.stages == TO_ACTIVATIONS:
            words += ["--act-bits", str(config.quant.act_bits), "--kv-bits", str(config.quant.kv_bits)]
            for name in ACTIVATION_SETTINGS:
                words += ["--set", f"quant.{name}={getattr(config.quant, name)}"]
        words += ["--set", f"quant.overrides={overrides}"]  # left out they would be the checkpoint's own
    for key, value in given.items():
        if key == "model" or plain[key] == value:
            continue
        if key in options:
            words += [options[key], str(value)]
        else:
            words += ["--set", f"{key}={json.dumps(value)}"]
    return words


def _leaves(config: RunConfig) -> dict[str, Any]:
    """Every setting by its path, section.key."""
    leaves: dict[str, Any] = {}
    for key, value in config.model_dump(mode="json").items():
        if isinstance(value, dict):
            leaves |= {f"{key}.{name}": setting for name, setting in value.items()}
        else:
            leaves[key] = value
    overrides = config.quant.model_dump(mode="json", exclude_none=True)["overrides"]
    return leaves | {"quant.overrides": overrides}
