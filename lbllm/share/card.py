"""The model card of an exported checkpoint: what it was made from, how, what was measured, how to load it.

Everything comes from the run's record and from the files; what neither knows is called not known or not measured.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from huggingface_hub import ModelCardData

from lbllm.checkpoints.record import RunRecord
from lbllm.config import RunConfig, arguments
from lbllm.labels import STAGE_NAMES, format_name, row_labels
from lbllm.models.catalogue import HUB_LICENCES
from lbllm.texts.catalogue import TEXTS, CorpusEntry, parts
from lbllm.units import size

CardKind = Literal["packed", "dense", "gguf"]

_CITATION = """    @inproceedings{lbllm,
      title = {LBLLM: Lightweight Binarization of Large Language Models via Three-Stage Distillation},
      author = {Song and Wang and Lang and Yang and Zhang},
      booktitle = {ACL},
      year = {2026},
      note = {arXiv:2604.19167}
    }"""
_TABLE = re.compile(r"(?P<text>.*), (?P<windows>\d+) windows of (?P<length>\d+) tokens")


@dataclass(frozen=True)
class Contents:
    """What a checkpoint is made of: binarized and dense weights counted in elements, and its bytes when packed."""

    architecture: str
    binarized: int
    dense: int
    packed_bytes: int


def model_card(
    record: RunRecord, kind: CardKind, name: str, files: dict[str, int], contents: Contents, *, chat: bool
) -> str:
    """README.md of an exported folder. ``files``: the bytes of its other files; ``chat``: there is a chat template."""
    record = record.public()
    settings = record.settings
    parts = [
        f"---\n{_front_matter(record, kind)}\n---\n\n# {name}",
        _introduction(record, kind, chat),
        "## How to load it\n\n" + _loading(kind, name, files, chat),
        "## What it is made from\n\n" + _origin(record),
        "## Size\n\n" + _sizes(record, kind, files, contents),
        "## Measured\n\n" + (_figures(record, settings, kind) if settings else "Not measured: its run is not known."),
        "## Method and settings\n\n" + _method(record),
        "## Limits\n\n" + _limits(kind, settings),
    ]
    return "\n\n".join(parts) + "\n"


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
    """The records of all runs that a checkpoint is the work of, the first one first."""
    return [*(_runs(record.start) if record.start is not None else []), record]


def _known_texts(record: RunRecord) -> list[CorpusEntry]:
    """The entries of the catalogue that any of the runs was trained on."""
    names = {name for run in _runs(record) if run.settings is not None for name in parts(run.settings.corpus)}
    return [entry for entry in TEXTS if entry.id in names]


def _introduction(record: RunRecord, kind: CardKind, chat: bool) -> str:
    settings = record.settings
    deployed = format_name(settings, settings.stages[-1]) if settings is not None else "W(1+1)"
    made = f"{_model(record)}, binarized to {deployed} with LBLLM Workbench"
    what = "A chat model" if chat else "A model that goes on with a text"
    if kind == "packed":
        return f"{what}: {made}. The weights lie packed, as bits and levels, and are computed from as they lie."
    form = "a GGUF file" if kind == "gguf" else "an ordinary folder of transformers"
    return (
        f"{what}: the dense copy, as {form}, of {made}. Its weights are what the bits and levels stand for, rounded to "
        "bfloat16. Activations and KV cache are not quantized in it, so it answers like the A16 model, not like the "
        "packed checkpoint, and it has none of its savings: it is there for programs that don't know the packed format."
    )


def _model(record: RunRecord) -> str:
    if record.base_model is not None:
        return f"[{record.base_model}](https://huggingface.co/{record.base_model})"
    return record.settings.model if record.settings is not None else "A model that is not known"


def _loading(kind: CardKind, name: str, files: dict[str, int], chat: bool) -> str:
    if kind == "gguf":
        file = next(file for file in files if file.endswith(".gguf"))
        return f"    llama-cli -m {shlex.quote(file)}\n\nor with any other program built on llama.cpp."
    first = "import lbllm  # registers the packed format\n    " if kind == "packed" else ""
    code = f"""    {first}from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = "{name}"
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)"""
    if kind == "dense":
        return f"{code}\n\nNothing but transformers is needed."
    talk = "chat" if chat else "chat --prompt 'Once upon a time'"
    return (
        "In the folder of LBLLM Workbench's source:\n\n    pip install .\n\nThen, where `folder` is this one or its "
        f"name on the hub:\n\n{code}\n\nor `python -m lbllm {talk} --model {shlex.quote(name)}`. Without "
        "`import lbllm` transformers refuses it. `lbllm.load(folder)` also checks the weights against the hash in "
        "config.json."
    )


def _origin(record: RunRecord) -> str:
    licence = record.licence or "not known"
    stored = record.precision or "not known"
    lines = [f"- Base model: {_model(record)}. Its weights as they were binarized: {stored}. Licence: {licence}."]
    runs = _runs(record)
    for number, run in enumerate(runs, 1):
        if len(runs) > 1:
            after = ", which went on from the checkpoint of the one before" if number > 1 else ""
            lines.append(f"- Run {number} of {len(runs)}{after}:")
        indent = "  " if len(runs) > 1 else ""
        lines += [f"{indent}- {line}" for line in _text(run)]
    return "\n".join(lines)


def _text(run: RunRecord) -> list[str]:
    """What a run was trained on."""
    if run.settings is None:
        return ["Text: not known."]
    known, lines = {entry.id: entry for entry in TEXTS}, []
    for name in parts(run.settings.corpus):
        if name in known:
            lines.append(f"Text `{name}`: {known[name].note}. Licence: {known[name].licence}.")
        else:
            lines.append(f"Text: {name}, its maker's own; its licence is not known here.")
    if run.corpus_hash is not None:
        lines.append(f"Of it {run.corpus_tokens:,} tokens, whose ids have the SHA-256 `{run.corpus_hash}`.")
    return lines


def _sizes(record: RunRecord, kind: CardKind, files: dict[str, int], contents: Contents) -> str:
    bpw = f"{record.bpw:.3f}" if record.bpw is not None else "an unknown number of"
    whole = f"{contents.binarized:,} weights are binarized"
    lines = [
        f"{contents.architecture}: {whole}, at {bpw} bits each when packed, group parameters included. "
        f"{contents.dense:,} (embeddings, norms, output head) stay in bfloat16."
    ]
    if kind != "packed":
        lines.append(
            f"In this copy all of them take 16 bits; the packed checkpoint's weights are {size(contents.packed_bytes)}."
        )
    return "\n\n".join(lines) + "\n\n" + _table(("file", "bytes"), [(f"`{f}`", f"{n:,}") for f, n in files.items()])


def _figures(record: RunRecord, settings: RunConfig, kind: CardKind) -> str:
    if not record.evaluations:
        return "Not measured: the checkpoint came without figures of its run."
    labels = row_labels(settings, record.precision or "precision not known")
    last = STAGE_NAMES[settings.stages[-1]].partition(":")[0]
    head = f"The packed checkpoint is the model after {last[0].lower()}{last[1:]}."
    if kind != "packed":
        head += " This dense copy itself was not measured: after stage 3 it has that stage's weights, but not its bits "
        head += "of activations."
    parts = [head]
    for text in dict.fromkeys(one.text for one in record.evaluations):
        rows = []
        for one in sorted(
            (one for one in record.evaluations if one.text == text), key=lambda e: list(labels).index(e.what)
        ):
            kl = "not measured" if one.kl is None else f"{one.kl:.3f}"
            same = "not measured" if one.top1_agreement is None else f"{100 * one.top1_agreement:.1f}%"
            rows.append((labels[one.what], f"{one.perplexity:,.2f}", kl, same))
        columns = ("", "perplexity", "KL to teacher, nats a token", "same most likely token")
        parts.append(f"On {text}:\n\n{_table(columns, rows)}\n\n{_printed_by(record, settings, text)}")
    return "\n\n".join(parts)


def _printed_by(record: RunRecord, settings: RunConfig, text: str) -> str:
    """How the figures on a text were measured: by the run itself, or by the command `table`."""
    found = _TABLE.fullmatch(text)
    if found is None or text.startswith("held-out part of "):
        return f"Measured by the run while it worked, and printed by `{_command(settings)}`."
    of = shlex.join(["--text", found["text"], "--seq-len", found["length"], "--limit", found["windows"]])
    return f"Printed by `python -m lbllm table {record.run or 'RUN'} {of}` after the run."


def _command(settings: RunConfig) -> str:
    return shlex.join(["python", "-m", "lbllm", "quantize", *arguments(settings), "--out", "FOLDER"])


def _method(record: RunRecord) -> str:
    text = (
        "LBLLM (Song, Wang, Lang, Yang, Zhang: LBLLM: Lightweight Binarization of Large Language Models via "
        "Three-Stage Distillation, ACL 2026, [arXiv 2604.19167](https://arxiv.org/abs/2604.19167)), in the independent "
        "implementation LBLLM Workbench. Each weight is one bit of sign and, in W(1+1), one bit that chooses one of "
        f"its group's two pairs of levels.\n\n{_CITATION}"
    )
    return "\n\n".join([text, *(_settings(run.settings) for run in _runs(record))])


def _settings(settings: RunConfig | None) -> str:
    """The command and the settings of one run."""
    if settings is None:
        return "The settings of the run are not known."
    stages = ", ".join(STAGE_NAMES[stage] for stage in settings.stages)
    sections = ("quant", *settings.stages)
    document = settings.model_dump_json(indent=2, include={"seq_len", "seed", "stages", *sections})
    indented = "\n".join(f"    {line}" for line in document.splitlines())
    return f"{stages}.\n\n    {_command(settings)}\n\nAll settings of these stages:\n\n{indented}"


def _limits(kind: CardKind, settings: RunConfig | None) -> str:
    lines = [
        "Binarization costs quality; a small model feels it more than a large one. Look at the measured figures, and "
        "measure on your own task, before it is used for anything.",
        "It has every limit of its base model. Nothing was done to make it safe, and whether binarization changed what "
        "it says about people, facts or dangers was not measured.",
    ]
    if settings is not None and settings.precision(settings.stages[-1]).act_bits == 16:
        lines.append("Weights alone are binarized: stage 3, which quantizes activations, was left out.")
    if kind == "packed":
        lines.append(
            "On the CPU it computes from its bits in C++, compiled at first use by the system's compiler; without one "
            "it is slow. Only `python -m lbllm quantize --from` trains its weights further."
        )
    return "\n".join(f"- {line}" for line in lines)


def _table(columns: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    lines = [columns, tuple("---" for _ in columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
