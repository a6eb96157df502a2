"""The model card of an exported checkpoint: what it was made from, how, what was measured, how to load it.

All content comes from the run's record and from the files. Where both lack something, the card says "not known" or
"not measured".
"""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import ModelCardData

from lbllm.checkpoints.record import RunRecord
from lbllm.config import RunConfig, arguments
from lbllm.labels import STAGE_NAMES, THREE_PLANES, format_name, row_labels
from lbllm.models.catalogue import HUB_LICENCES
from lbllm.quant.table import has_table
from lbllm.templates import environment
from lbllm.texts.catalogue import TEXTS, CorpusEntry, parts
from lbllm.units import against_16_bits, size

CardKind = Literal["packed", "dense", "gguf"]

_TEMPLATES = environment(__file__)
_TABLE = re.compile(r"(?P<text>.*), (?P<windows>\d+) windows of (?P<length>\d+) tokens")


@dataclass(frozen=True)
class Contents:
    """The size of a checkpoint: numbers of binarized and of dense weights, bytes of the packed file, and the bits of
    embeddings and output head; ``q8_0``: a GGUF file has these as they are packed; ``experts``: what the experts of a
    mixture take, as a sentence. ``types``: of the weights in a GGUF file, in words; None for bfloat16."""

    architecture: str
    binarized: int
    dense: int
    packed_bytes: int
    embedding_bits: int = 16
    q8_0: bool = False
    experts: str = ""
    types: str | None = None


@dataclass(frozen=True)
class _Run:
    """A run as the card shows it. ``texts``: the names of its texts, each with its entry in the catalogue, or with
    None if it has no entry. ``stages``, ``command``, ``document``: the stages, the command that repeats
    the run, all settings. If the settings are not known, all of them are empty."""

    record: RunRecord
    texts: list[tuple[str, CorpusEntry | None]] | None = None
    stages: str = ""
    command: str = ""
    document: str = ""


@dataclass(frozen=True)
class MeasuredOn:
    """The figures on one text: rows of label, perplexity, KL and agreement, and the command that prints them. They were
    measured in the run or after it."""

    text: str
    rows: list[tuple[str, str, str, str]]
    command: str
    by_the_run: bool


def model_card(
    record: RunRecord, kind: CardKind, name: str, files: dict[str, int], contents: Contents, *, chat: bool
) -> str:
    """README.md of an exported folder. ``files``: the bytes of its other files; ``chat``: there is a chat template."""
    record = record.public()
    settings = record.settings
    stage = STAGE_NAMES[settings.stages[-1]].partition(":")[0] if settings is not None else ""
    talk = ["chat"] if chat else ["chat", "--prompt", "Once upon a time"]
    return _TEMPLATES.get_template("card.md.jinja").render(
        record=record,
        kind=kind,
        name=name,
        files=files,
        contents=contents,
        chat=chat,
        front_matter=_front_matter(record, kind),
        deployed=format_name(settings, settings.stages[-1]) if settings is not None else "W(1+1)",
        shell_file=shlex.quote(next((file for file in files if file.endswith(".gguf")), "")),
        chat_command=shlex.join(["python", "-m", "lbllm", *talk, "--model", name]),
        packed_size=size(contents.packed_bytes),
        against=against_16_bits(contents.packed_bytes, contents.binarized + contents.dense),
        runs=[_told(run) for run in _runs(record)],
        measured=measured_on(record, settings) if settings is not None else [],
        last_stage=stage[:1].lower() + stage[1:],
        three_planes=THREE_PLANES if settings is not None and _has_table(settings) else "",
        weights_alone=settings is not None and settings.precision(settings.stages[-1]).act_bits == 16,
    )


def _has_table(settings: RunConfig) -> bool:
    """Whether some layers have three planes."""
    quant = settings.quant
    kinds = [quant.format, *(override.format for override in quant.overrides.values())]
    return any(kind is not None and has_table(kind) for kind in kinds)


def _front_matter(record: RunRecord, kind: CardKind) -> str:
    licence = record.licence
    identifier = None
    if licence is not None and not licence.startswith(("not stated", "none", "see ")):
        identifier = HUB_LICENCES.get(licence.lower(), licence if licence in HUB_LICENCES.values() else "other")
    data = ModelCardData(
        base_model=record.base_model,
        license=identifier,
        license_name=re.sub(r"[^a-z0-9.]+", "-", licence.lower()).strip("-")
        if licence and identifier == "other"
        else None,
        library_name="gguf" if kind == "gguf" else "transformers",
        pipeline_tag="text-generation",
        datasets=[entry.hub[0] for entry in _known_texts(record) if entry.hub] or None,
        tags=["lbllm", "binarized", *(["dequantized"] if kind != "packed" else ["1-bit"])],
    )
    relation = "\nbase_model_relation: quantized" if record.base_model else ""
    return str(data.to_yaml()).strip() + relation


def _runs(record: RunRecord) -> list[RunRecord]:
    """The records of all runs that made a checkpoint, the first one first."""
    return [*(_runs(record.start) if record.start is not None else []), record]


def _known_texts(record: RunRecord) -> list[CorpusEntry]:
    """The texts of the catalogue that any of the runs was trained on."""
    names = {name for run in _runs(record) if run.settings is not None for name in parts(run.settings.corpus)}
    return [entry for entry in TEXTS if entry.id in names]


def _told(record: RunRecord) -> _Run:
    settings = record.settings
    if settings is None:
        return _Run(record)
    known = {entry.id: entry for entry in TEXTS}
    sections = ("quant", *settings.stages)
    return _Run(
        record,
        texts=[(name, known.get(name)) for name in parts(settings.corpus)],
        stages=", ".join(STAGE_NAMES[stage] for stage in settings.stages),
        command=repeat_command(settings),
        document=settings.model_dump_json(indent=2, include={"seq_len", "seed", "stages", *sections}),
    )


def measured_on(record: RunRecord, settings: RunConfig) -> list[MeasuredOn]:
    """The figures of a record by text, the models in the order of the stages."""
    labels = row_labels(settings, record.precision or "precision not known")
    order = list(labels)
    found = []
    for text in dict.fromkeys(one.text for one in record.evaluations):
        rows = []
        for one in sorted((one for one in record.evaluations if one.text == text), key=lambda e: order.index(e.what)):
            kl = "not measured" if one.kl is None else f"{one.kl:.3f}"
            same = "not measured" if one.top1_agreement is None else f"{100 * one.top1_agreement:.1f}%"
            rows.append((labels[one.what], f"{one.perplexity:,.2f}", kl, same))
        table = _table_command(record, text)
        found.append(MeasuredOn(text, rows, table or repeat_command(settings), by_the_run=table is None))
    return found


def _table_command(record: RunRecord, text: str) -> str | None:
    """The command that measured the figures on a text, or None if the run itself measured them."""
    found = _TABLE.fullmatch(text)
    if found is None or text.startswith("held-out part of "):
        return None
    of = ["--text", found["text"], "--seq-len", found["length"], "--limit", found["windows"]]
    return shlex.join(["python", "-m", "lbllm", "table", record.run or "RUN", *of])


def repeat_command(settings: RunConfig) -> str:
    """The command line that repeats a run."""
    return shlex.join(["python", "-m", "lbllm", "quantize", *arguments(settings), "--out", "FOLDER"])
