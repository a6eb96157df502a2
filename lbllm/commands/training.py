"""quantize, estimate, demo."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from lbllm.commands.attend import Outcome, attend, check_out
from lbllm.commands.chatting import chat
from lbllm.commands.measuring import evaluate_run, rows_table
from lbllm.commands.options import (
    ActBitsOption,
    ConfigOption,
    CorpusOption,
    FormatOption,
    FromOption,
    GroupSizeOption,
    IgnoreMemoryOption,
    JsonOption,
    KvBitsOption,
    LimitOption,
    OutOption,
    PresetOption,
    ProcessesOption,
    RunDeviceOption,
    SetOption,
    TeacherOption,
    run_config,
)
from lbllm.commands.output import notices, plain, print_json, results
from lbllm.config import RunConfig
from lbllm.errors import LbllmError, ResourceError
from lbllm.labels import BINARIZED_BITS, format_name
from lbllm.runs.store import Run, RunStore
from lbllm.units import against_16_bits, duration, size

if TYPE_CHECKING:
    from lbllm.measure.estimate import Estimate


def quantize(
    out: OutOption,
    model: TeacherOption = None,
    preset: PresetOption = None,
    group_size: GroupSizeOption = None,
    weight_format: FormatOption = None,
    act_bits: ActBitsOption = None,
    kv_bits: KvBitsOption = None,
    corpus: CorpusOption = None,
    device: RunDeviceOption = None,
    assignments: SetOption = None,
    config: ConfigOption = None,
    start: FromOption = None,
    processes: ProcessesOption = None,
    ignore_memory: IgnoreMemoryOption = False,
    as_json: JsonOption = False,
) -> None:
    """Binarize a model: all stages with live progress, then the packed checkpoint in --out.

    Ctrl-C stops the run and keeps its finished blocks; `runs resume` continues from them.
    """
    settings = run_config(
        model, preset, group_size, weight_format, act_bits, kv_bits, corpus, device, assignments, config, start
    )
    console = notices(quiet=as_json)
    outcome = _quantize(RunStore(), settings, out, console, processes=processes or 1, ignore_memory=ignore_memory)
    print_outcome(outcome, as_json=as_json)


def _quantize(
    store: RunStore,
    config: RunConfig,
    out: Path,
    console: Console,
    *,
    processes: int = 1,
    ignore_memory: bool = False,
) -> Outcome:
    """Check, estimate, run, and put the checkpoint in ``out``."""
    from lbllm.machine import check_processes
    from lbllm.measure.estimate import check_disk, check_memory, estimate

    check_out(out)
    check_processes(config.device, processes)
    _tell_reading(config, console)
    result = estimate(config)
    console.print(_estimate_table(config, result))
    if not ignore_memory:
        try:
            check_memory(result, config.device, processes)
        except ResourceError as error:
            raise ResourceError(f"{error}; --ignore-memory starts it anyway") from None
    check_disk(result, store.root)
    run = store.create(config)
    plain(console, f"run {run.id} in {run.folder}; Ctrl-C stops it and keeps its work", style="dim")
    return attend(store, run, console, out, result.stage_seconds, processes)


def print_outcome(outcome: Outcome, *, as_json: bool) -> None:
    """Print the result of a finished run."""
    if as_json:
        print_json(asdict(outcome))
        return
    took = f"{size(outcome.disk_bytes)}, {outcome.bpw:.3f} {BINARIZED_BITS}, {duration(outcome.seconds)}"
    plain(results(), f"run {outcome.run} is done. {outcome.path}: {took}")


def estimate(
    model: TeacherOption = None,
    preset: PresetOption = None,
    group_size: GroupSizeOption = None,
    weight_format: FormatOption = None,
    act_bits: ActBitsOption = None,
    kv_bits: KvBitsOption = None,
    corpus: CorpusOption = None,
    device: RunDeviceOption = None,
    assignments: SetOption = None,
    config: ConfigOption = None,
    start: FromOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate a run's result and cost: bits per binarized weight, disk, memory, time."""
    from lbllm.measure.estimate import estimate

    settings = run_config(
        model, preset, group_size, weight_format, act_bits, kv_bits, corpus, device, assignments, config, start
    )
    _tell_reading(settings, notices(quiet=as_json))
    result = estimate(settings)
    if as_json:
        memory = {"memory_bytes": result.memory_bytes, "memory_parts": result.memory_parts}
        print_json(asdict(result) | memory)
    else:
        results().print(_estimate_table(settings, result))


def demo(
    out: OutOption = Path("runs/quick"),
    model: TeacherOption = None,
    preset: PresetOption = None,
    limit: LimitOption = 10,
    prompt: Annotated[str, typer.Option(help="The question for both models.")] = "What is the capital of France?",
) -> None:
    """Binarize, print the table of all stages, and let teacher and student answer: the whole thing in one command.

    If --out already has a checkpoint, it is used; an unfinished run of the same settings is resumed.
    """
    from lbllm.checkpoints.hf import is_checkpoint

    config = run_config(model, preset)
    console = notices()
    store = RunStore()
    same = [run for run in store.all() if _has_config(run, config)]
    finished = [run for run in same if run.state == "done"]
    unfinished = [run for run in same if run.can_be_resumed]
    if finished and is_checkpoint(out):
        run = finished[-1]
        plain(console, f"{out} exists already, from run {run.id} or an equal one")
    else:
        if unfinished:
            check_out(out)
            plain(console, f"resuming run {unfinished[-1].id}")
            outcome = attend(store, unfinished[-1], console, out)
        else:
            outcome = _quantize(store, config, out, console)
        print_outcome(outcome, as_json=False)
        run = store.get(outcome.run)
    text, rows = evaluate_run(store, run, console, limit=limit)
    results().print(rows_table(text, rows))
    chat([config.model, str(out)], prompt=prompt, max_new_tokens=64)


def _has_config(run: Run, config: RunConfig) -> bool:
    try:
        return run.config == config
    except LbllmError:
        return False


def _tell_reading(config: RunConfig, console: Console) -> None:
    from lbllm.texts.corpus import reading_note  # late: it brings torch

    note = reading_note(config.corpus, config.tokens)
    if note is not None:
        plain(console, note)


def _estimate_table(config: RunConfig, result: Estimate) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_row("model", config.model)
    deployed = format_name(config, config.stages[-1])
    grid.add_row("settings", f"{config.preset}: {deployed}, group {config.quant.group_size}")
    grid.add_row("blocks", str(result.blocks))
    grid.add_row("binarized weights", f"{result.weights:,} at {result.bpw:.3f} bits each, parameters included")
    grid.add_row("kept dense", f"{result.dense_weights:,}")
    grid.add_row("checkpoint", f"{size(result.disk_bytes)}, {against_16_bits(result.disk_bytes, result.parameters)}")
    if result.cache is not None:
        grid.add_row(
            "KV cache",
            f"{size(result.cache.nbytes)} for {result.cache.tokens:,} tokens, {result.cache.bits:.2f} bits per value",
        )
    states = "in files on disk" if result.needs.streams == "disk" else "in memory"
    grid.add_row("peak memory", f"{size(result.memory_bytes)}, hidden states {states}")
    if result.needs.gpu:
        grid.add_row("GPU memory", size(sum(result.needs.gpu.values())))
    grid.add_row("disk space", size(sum(result.needs.disk.values())))
    grid.add_row("time", f"about {duration(result.seconds)}, with loading and evaluation")
    return grid
