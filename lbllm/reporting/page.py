"""The report as one HTML page: it loads nothing, runs no script, fits a phone, and is printed on A4.

report(find_subjects(["20261122-103041-1d371b"], runs), EvaluationStore())
"""

from __future__ import annotations

import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from lbllm.evaluation.baseline import CALIBRATION_TOKENS
from lbllm.evaluation.results import answers_results, text_results
from lbllm.evaluation.store import EvaluationStore
from lbllm.evaluation.words import range_text
from lbllm.events import stage_parts
from lbllm.labels import BINARIZED_BITS, STAGE_NAMES
from lbllm.models.catalogue import last_part
from lbllm.reporting.charts import Curves, Place, Plot, Rows, Value, curves, plot, rows
from lbllm.reporting.evaluations import Group, Stored, Wish, groups_of, stored
from lbllm.reporting.quality import Answers, Part, Table, in_tasks, on_text, speed, to_prompts
from lbllm.reporting.subjects import Subject, parameters
from lbllm.reporting.words import in_words
from lbllm.runs.compared import Point, cautions, differing, frontier, setting_label
from lbllm.runs.view import RunView
from lbllm.sections import STAGES, stage_number
from lbllm.share.card import MeasuredOn, measured_on, repeat_command
from lbllm.templates import environment
from lbllm.units import against_16_bits, duration, number_text, size

MOST_TEXTS = 3
TEACHER_HUE = 0  # subjects have 1, 2, ...; other models the last one
OTHER_HUE = 9
_HUES = 8
_TEMPLATES = environment(__file__)


@dataclass(frozen=True)
class Tile:
    """A figure that stands out: its value, what it is, and how it compares."""

    value: str
    label: str
    note: str = ""


@dataclass(frozen=True)
class About:
    """A subject as the page shows it. ``state``: a sentence for a run that is not done; ``words``: its settings;
    ``tables``: what the run and its table have measured."""

    title: str
    hue: int
    state: str
    facts: list[str]
    tiles: list[Tile]
    words: dict[str, str]
    command: str
    blocks: Curves | None
    block_table: Table | None
    block_notes: list[str]
    tables: list[MeasuredOn]
    problem: str


@dataclass(frozen=True)
class Measured:
    """What is known of the subjects of one teacher. ``commands``: of what is not measured yet."""

    title: str
    sizes: Rows | None
    plots: list[Plot]
    texts: list[Part]
    tasks: list[Part]
    answers: Answers | None
    speed: Part | None
    notes: list[str] = field(default_factory=list)


def report(subjects: Sequence[Subject], store: EvaluationStore, wish: Wish | None = None) -> str:
    """The page as text, to save in UTF-8, with what is known now. Its template escapes every text."""
    wish = wish or Wish()
    hues = {subject.name: 1 + number % _HUES for number, subject in enumerate(subjects)}
    found: list[Measured] = []
    counts: dict[str, int | None] = {}
    tiles: dict[str, list[Tile]] = {}
    for group in groups_of(subjects):
        texts = stored(store, group, "text", wish)[:MOST_TEXTS]
        prompts = next(iter(stored(store, group, "prompts", wish)), None)
        tasks = stored(store, group, "tasks", wish)
        counts |= {subject.name: parameters(subject) for subject in group.subjects}
        for subject in group.subjects:
            tiles[subject.name] = _quality_tiles(subject, texts[0] if texts else None, prompts)
        found.append(_measured(group, texts, tasks, prompts, hues, counts))
    about = [
        _about(subject, hues[subject.name], counts.get(subject.name), tiles.get(subject.name, []))
        for subject in subjects
    ]
    # Settings without the places of this machine.
    listed = [replace(one.listed, config=one.record.settings) for one in subjects if one.listed is not None]
    different, same = differing(listed) if len(listed) > 1 else ({}, 0)
    return _TEMPLATES.get_template("report.html.jinja").render(
        title=subjects[0].title if len(subjects) == 1 else f"{len(subjects)} models compared",
        when=time.strftime("%-d %B %Y, %H:%M"),
        about=about,
        groups=found,
        bits_label=BINARIZED_BITS,
        settings_table=_settings_table(different, [one.title for one in subjects if one.listed is not None]),
        same=same,
        cautions=cautions(listed) if len(listed) > 1 else [],
        gptq_tokens=f"{CALIBRATION_TOKENS:,}",
        command=shlex.join(["python", "-m", "lbllm", "report", *map(_public_name, subjects)]),
    )


def _public_name(subject: Subject) -> str:
    """A subject's name for others: of a folder the last part, because the rest describes this machine."""
    return subject.name if subject.listed is not None else last_part(subject.name)


def _settings_table(different: dict[str, list[str]], names: list[str]) -> Table | None:
    if not different:
        return None
    rows = [[setting_label(path), *values] for path, values in different.items()]
    return Table("Settings that differ", ["Setting", *names], rows, names=True)


def _hues_in(made: Stored, hues: dict[str, int]) -> dict[int, int]:
    """The colours of an evaluation's models by their indices."""
    found = dict.fromkeys(range(len(made.job.models)), OTHER_HUE) | {made.reference: TEACHER_HUE}
    return found | {number: hues[name] for name, number in made.numbers.items()}


def _measured(
    group: Group,
    texts: list[Stored],
    tasks: list[Stored],
    prompts: Stored | None,
    hues: dict[str, int],
    counts: dict[str, int | None],
) -> Measured:
    notes = []
    if len(group.subjects) > len(group.answering):
        notes.append(
            f"Answers and speed are those of the first {len(group.answering)} of {len(group.subjects)} models."
        )
    runs = [(subject.title, subject.listed) for subject in group.subjects if subject.listed is not None]
    return Measured(
        group.title,
        _sizes(group, hues, counts),
        _plots(group, texts[0], hues) if texts else [],
        [on_text(one, _hues_in(one, hues)) for one in texts],
        [in_tasks(one, _hues_in(one, hues)) for one in tasks],
        to_prompts(prompts) if prompts is not None else None,
        speed(prompts, runs, _hues_in(prompts, hues) if prompts is not None else {}),
        notes,
    )


def _sizes(group: Group, hues: dict[str, int], counts: dict[str, int | None]) -> Rows | None:
    """The files beside the teacher's in 16 bits."""
    known = next((count for subject in group.subjects if (count := counts[subject.name])), None)
    values = []
    if known is not None:
        values.append(Value(f"{group.title}, in 16 bits", size(2 * known), 2 * known / 1e6, hue=TEACHER_HUE))
    for subject in group.subjects:
        if subject.disk_bytes is not None:
            bits = f", {subject.bits:.2f} {BINARIZED_BITS}" if subject.bits is not None else ""
            text = f"{size(subject.disk_bytes)}{bits}"
            values.append(Value(subject.title, text, subject.disk_bytes / 1e6, hue=hues[subject.name]))
    return rows("Size of the weights, in MB", values, bars=True)


def _plots(group: Group, text: Stored, hues: dict[str, int]) -> list[Plot]:
    """Bits against quality, where there are several points."""
    results = text_results(text.job, text.parts)
    bits = {text.numbers[one.name]: one.bits for one in group.subjects}
    bits |= {n: found for n in range(len(text.job.models)) if (found := text.baseline_bits(n)) is not None}
    colours, made = _hues_in(text, hues), []
    for label, values in (
        ("Perplexity", {n: one.perplexity for n, one in results.items()}),
        ("KL to the teacher, nats per token", {n: one.kl for n, one in results.items()}),
    ):
        points = [Point(str(n), x, y) for n, x in bits.items() if x is not None and (y := values.get(n)) is not None]
        best = {point.run for point in frontier(points)}
        places = [
            Place(text.titles[int(one.run)], one.x, one.y, colours[int(one.run)], one.run in best) for one in points
        ]
        title = f"{label} against {BINARIZED_BITS}"
        drawn = plot(title, BINARIZED_BITS, label, places) if len(group.subjects) > 1 else None
        made += [drawn] if drawn is not None else []
    return made


def _quality_tiles(subject: Subject, text: Stored | None, prompts: Stored | None) -> list[Tile]:
    tiles = []
    results = text_results(text.job, text.parts) if text is not None else {}
    if text is not None:
        own, teacher = results[text.numbers[subject.name]], results[text.reference]
        within = range_text(own.interval)
        note = f"{within}; teacher {number_text(teacher.perplexity)}".removeprefix("; ")
        tiles.append(Tile(number_text(own.perplexity), f"perplexity on {last_part(text.job.text)}", note))
        if own.kl is not None and own.agreement is not None:
            tiles.append(Tile(number_text(own.kl), "KL to the teacher, nats per token", range_text(own.kl_interval)))
            tiles.append(Tile(f"{100 * own.agreement:.1f}%", "same most likely token as the teacher"))
    if prompts is not None and subject.name in prompts.numbers:
        written = answers_results(prompts.job, prompts.parts)
        own_rate, teacher_rate = (
            written[n].tokens_per_second for n in (prompts.numbers[subject.name], prompts.reference)
        )
        if own_rate:
            note = f"teacher {teacher_rate:.1f}" if teacher_rate else ""
            tiles.append(Tile(f"{own_rate:.1f}", "tokens per second in answers", note))
    return tiles


def _about(subject: Subject, hue: int, count: int | None, quality: list[Tile]) -> About:
    tiles = []
    if subject.disk_bytes is not None:
        note = against_16_bits(subject.disk_bytes, count) if count else ""
        tiles.append(Tile(size(subject.disk_bytes), "file of the weights", note))
    if subject.bits is not None:
        tiles.append(Tile(f"{subject.bits:.2f}", BINARIZED_BITS, "group parameters counted"))
    settings, view = subject.record.settings, subject.view
    blocks = _blocks(view) if view is not None else None
    notes = ["On the text that a stage learns from. Before stage 1 a block is not binarized, but its inputs are."]
    if view is None:
        notes = ["The losses of the blocks are stored with the run, not with the checkpoint."]
    return About(
        title=subject.title,
        hue=hue,
        state=_state(subject),
        facts=_facts(subject),
        tiles=[*tiles, *quality],
        words=in_words(settings) if settings is not None else {},
        command=repeat_command(settings) if settings is not None else "",
        blocks=blocks,
        block_table=_block_table(view) if view is not None else None,
        block_notes=notes + (_diverged(view) if view is not None else []),
        tables=measured_on(subject.record, settings) if settings is not None else [],
        problem=subject.problem if subject.state == "done" else "",
    )


def _state(subject: Subject) -> str:
    """What to know of a run that is not done."""
    one = subject.listed
    if one is None or one.run.state == "done":
        return ""
    done, parts = one.parts
    far = f" {done} of {parts} parts are finished." if parts else ""
    left = f" About {duration(one.left)} are left." if one.left is not None else ""
    why = f" {subject.view.failure}" if subject.view is not None and subject.view.failure else ""
    so_far = " The figures are those so far; what needs its checkpoint is missing."
    return f"This run is not finished: it is {one.run.state}.{far}{left}{why}{so_far}"


def _facts(subject: Subject) -> list[str]:
    one, record = subject.listed, subject.record
    said = []
    if one is not None:
        made = time.strftime("%-d %B %Y", time.localtime(one.run.created))
        said.append(f"Run {one.run.id}, {made}; {duration(one.seconds)} of work")
        if one.note.tags:
            said.append(f"Tags: {', '.join(one.note.tags)}")
        if one.note.text:
            said.append(one.note.text)
    if record.base_model is not None:
        said.append(f"Made from {record.base_model}, weights {record.precision or 'of unknown precision'}")
    if record.licence is not None:
        said.append(f"Licence of the model: {record.licence}")
    return said


def _blocks(view: RunView) -> Curves | None:
    """The loss of every finished block before and after each stage."""
    lines: dict[tuple[str, int, bool], list[tuple[float, float]]] = {}
    for block in view.finished:
        if block.stage != "e2e" and block.done is not None:
            name, hue = STAGE_NAMES[block.stage], stage_number(block.stage)
            lines.setdefault((name, hue, False), []).append((block.block + 1, block.done.loss_after))
            if block.stage != "ptq":
                lines.setdefault((f"before {name}", hue, True), []).append((block.block + 1, block.done.loss_before))
    return curves("Loss of every block: its output's error relative to the teacher's output", "block", "loss", lines)


def _block_table(view: RunView) -> Table | None:
    table = []
    for stage in STAGES:
        done = [block.done for block in view.finished if block.stage == stage and block.done is not None]
        if not done or view.started is None:
            continue
        before = sum(event.loss_before for event in done) / len(done)
        after = sum(event.loss_after for event in done) / len(done)
        worst = max(done, key=lambda event: event.loss_after)
        place = "the whole model" if stage == "e2e" else f"{number_text(worst.loss_after)} in block {worst.block + 1}"
        counted = f"{len(done)} of {stage_parts(stage, view.started.blocks)}"
        table.append([STAGE_NAMES[stage], counted, number_text(before), number_text(after), place])
    return (
        Table("Loss of the blocks", ["Stage", "Done", "Mean before", "Mean after", "Largest"], table) if table else None
    )


def _diverged(view: RunView) -> list[str]:
    count = len(view.diverged)
    if not count:
        return []
    kept = "block keeps its state" if count == 1 else "blocks keep their state"
    return [f"{count} {kept} from before a stage, because training made it worse."]


def report_name(titles: Sequence[str]) -> str:
    """A name for the file of a report on what has these titles: "report-tiny-one.html"."""
    words = titles[0] if len(titles) == 1 else f"{len(titles)} models"
    kept = "".join(letter if letter.isascii() and letter.isalnum() else "-" for letter in words.lower())
    return f"report-{'-'.join(filter(None, kept.split('-')))[:60] or 'run'}.html"


def problems_of(subjects: Sequence[Subject]) -> list[str]:
    """Why subjects can't be measured, a sentence each."""
    return [f"{subject.title}: {subject.problem}" for subject in subjects if subject.problem]
