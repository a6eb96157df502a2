"""What each reduction of precision costs a finished run: ``python -m benchmarks.precision_cost RUN``.

    python -m benchmarks.precision_cost 20261122-135811-bcaf0e --text notes.txt
    python -m benchmarks.precision_cost 20261122-135811-bcaf0e --text wikitext2 --limit 10

RUN is a run's id, or the folder with its settings and block states. All models have the bits and levels that the run
ended with, unless a stage is named, and are computed as they are deployed. Printed are perplexities on the same
windows: with activations and KV cache in 16, 8 and 4 bits (8: an even grid over each range); with group
parameters in 8 bits instead of float16; and, where the run quantizes activations, by kind of input and by depth, with
all inputs in 4 bits except one group's, and with only that group's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks import markdown
from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.config import RunConfig, parse_config
from lbllm.errors import ConfigError, RunError
from lbllm.labels import STAGE_NAMES
from lbllm.measure.perplexity import perplexity
from lbllm.models.blocks import capture_calls, decoder_blocks, first_inputs, shared_inputs
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.pipeline.packed_model import stage_model
from lbllm.quant.activations import ActQuantizer
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.store import RunStore
from lbllm.sections import Origin, ParamBits
from lbllm.texts.windows import evaluation_windows

PROBE = 8  # tokens that tell which layers read the same input
PARTS = 4  # of the depth


@dataclass(frozen=True)
class Measured:
    """A row of a table: what it is, its perplexity, and that of the model it is compared with."""

    label: str
    perplexity: float
    base: float

    @property
    def change(self) -> float:
        """The perplexity's increase as a share of the base."""
        return self.perplexity / self.base - 1


class Precision:
    """Models of the run in ``folder``, measured on windows of token ids (n, T)."""

    def __init__(
        self, config: RunConfig, folder: Path, teacher: Teacher, sequences: Tensor, report: Callable[[str], None]
    ) -> None:
        self.config, self.folder, self.teacher, self.sequences = config, folder, teacher, sequences
        self.report = report
        ended = config.precision(config.stages[-1])
        self.act, self.kv = ended.act_bits, ended.kv_bits

    def model(self, kv_bits: int, param_bits: ParamBits, stage: Origin | None = None) -> PreTrainedModel:
        """The run's model after a stage, the last one by default, with these bits of KV cache and group parameters."""
        quant = self.config.quant.model_copy(update={"kv_bits": kv_bits, "param_bits": param_bits})
        config = self.config.model_copy(update={"quant": quant})
        return stage_model(config, self.folder, stage or config.stages[-1], self.teacher)

    def measured(self, label: str, model: PreTrainedModel) -> float:
        """The model's perplexity."""
        value = perplexity(model, self.sequences).perplexity
        self.report(f"{label}: {value:,.2f}")
        return value

    def by_bits(self) -> list[Measured]:
        """Activations and KV cache of the same weights in fewer and fewer bits; the first row is what the others are
        compared with, the last one the model as it is deployed."""
        rows: list[Measured] = []
        bits = [(16, 16), (16, self.kv)]
        if self.act < 16:
            bits += [(8, self.kv), (self.act, 16), (self.act, self.kv)]
        for act_bits, kv_bits in dict.fromkeys(bits):
            model = self.model(kv_bits, self.config.quant.param_bits)
            if act_bits != self.act:
                size = self.config.quant.act_group_size
                for layer in packed_layers(model).values():
                    layer.quantizer = ActQuantizer(act_bits, tail=0, group_size=size) if act_bits < 16 else None
            label = f"A{act_bits}KV{kv_bits}"
            value = self.measured(label, model)
            rows.append(Measured(label, value, rows[0].base if rows else value))
        return rows

    def by_params(self, deployed: float) -> list[Measured]:
        """Group parameters in 8 bits against float16, in the starting checkpoint or after stage 2, and
        after the last stage, whose model is ``deployed``; none where the run has fewer than 16 already."""
        if self.config.quant.param_bits < 16:
            return []
        rows: list[Measured] = []
        last = self.config.stages[-1]
        for stage in dict.fromkeys([stage for stage in self.config.origins if stage in ("start", "wat")] + [last]):
            name = STAGE_NAMES[stage]
            base = deployed if stage == last else self.measured(f"{name}, float16", self.model(self.kv, 16, stage))
            rows.append(Measured(name, self.measured(f"{name}, 8 bits", self.model(self.kv, 8, stage)), base))
        return rows

    def by_group(self, groups: dict[str, set[str]], free: float, deployed: float) -> list[tuple[Measured, Measured]]:
        """For each group of layers: all inputs quantized except theirs, against the ``deployed`` model, and only
        theirs, against the one with ``free`` activations. The group that costs most comes first."""
        model = self.model(self.kv, self.config.quant.param_bits)
        layers = packed_layers(model)
        own = {name: layer.quantizer for name, layer in layers.items()}
        rows = []
        for label, members in groups.items():
            found = []
            for what, kept, base in (
                ("all but", own.keys() - members, deployed),
                ("only", own.keys() & members, free),
            ):
                for name, layer in layers.items():
                    layer.quantizer = own[name] if name in kept else None
                found.append(Measured(label, self.measured(f"A{self.act}, {what} {label}", model), base))
            rows.append((found[0], found[1]))
        return sorted(rows, key=lambda row: row[0].perplexity)


def packed_layers(model: PreTrainedModel) -> dict[str, PackedLinear]:
    """The packed layers by their full names."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def kinds(teacher: Teacher, sequence: Tensor) -> dict[str, set[str]]:
    """The full names of the blocks' layers, those together that read the same input in their blocks; found on a
    sequence (1, T)."""
    path, blocks = decoder_blocks(teacher.model)
    calls, hidden = capture_calls(teacher.model, sequence), first_inputs(teacher.model, sequence, 1)
    found: dict[str, set[str]] = {}
    for number, (block, call) in enumerate(zip(blocks, calls, strict=True)):
        for names in shared_inputs(block, hidden, call):
            label = ", ".join([names[0], *(name.rpartition(".")[2] for name in names[1:])])
            found.setdefault(label, set()).update(f"{path}.{number}.{name}" for name in names)
    return found


def depths(teacher: Teacher, names: Iterable[str]) -> dict[str, set[str]]:
    """The same layers by the fourths of the depth."""
    path, blocks = decoder_blocks(teacher.model)
    found: dict[str, set[str]] = {}
    parts: dict[int, list[int]] = {}
    for number in range(len(blocks)):
        parts.setdefault(number * PARTS // len(blocks), []).append(number)
    for numbers in parts.values():
        prefixes = tuple(f"{path}.{number}." for number in numbers)
        found[f"blocks {numbers[0]} to {numbers[-1]}"] = {name for name in names if name.startswith(prefixes)}
    return found


def opened(name: str) -> tuple[RunConfig, Path]:
    """The settings and the folder of the run that ``name`` means. Raises RunError."""
    folder = Path(name).expanduser()
    if not (folder / "blocks").is_dir():
        run = RunStore().get(name)
        return run.config, run.folder
    try:
        return parse_config(json.loads((folder / "config.json").read_text())), folder
    except (OSError, ValueError, ConfigError) as error:
        raise RunError(f"{folder}: its settings can't be read from config.json ({error})") from None


def measured_rows(precision: Precision) -> list[dict[str, Any]]:
    """All that is measured, as ``--out`` keeps it: parts ``bits``, ``params``, ``inputs`` and ``depth``."""
    bits = precision.by_bits()
    by_label = {row.label: row.perplexity for row in bits}
    free, deployed = by_label[f"A16KV{precision.kv}"], bits[-1].perplexity
    found: list[dict[str, Any]] = [
        {"part": "bits", "label": row.label, "perplexity": row.perplexity, "change": row.change} for row in bits
    ]
    for row in precision.by_params(deployed):
        figures = {"base": row.base, "perplexity": row.perplexity, "change": row.change}
        found.append({"part": "params", "label": row.label} | figures)
    if precision.act == 16:
        return found
    layers = kinds(precision.teacher, precision.sequences[:1, :PROBE])
    names = set[str]().union(*layers.values())
    for part, groups in (("inputs", layers), ("depth", depths(precision.teacher, names))):
        for without, alone in precision.by_group(groups, free, deployed):
            figures = {"without": without.perplexity, "without_change": without.change}
            figures |= {"alone": alone.perplexity, "alone_change": alone.change}
            found.append({"part": part, "label": without.label} | figures)
    return found


def tables(found: list[dict[str, Any]], act: int) -> str:
    """The rows as Markdown; ``act``: the run's activation bits."""
    shown = []
    columns = {
        "bits": ["activations, KV cache", "perplexity", f"over {found[0]['label']}"],
        "params": ["group parameters", "float16", "8 bits", ""],
        "inputs": ["inputs of", f"all A{act} but these", "", f"only these A{act}", ""],
        "depth": ["depth", f"all A{act} but these", "", f"only these A{act}", ""],
    }
    for part, heads in columns.items():
        rows = [{key: value for key, value in row.items() if key != "part"} for row in found if row["part"] == part]
        if rows:
            shown.append(markdown.table(heads, [[_cell(*item) for item in row.items()] for row in rows]))
    return "\n\n".join(shown)


def _cell(key: str, value: str | float) -> str:
    if isinstance(value, str):
        return value
    return f"{value:+.1%}" if key.endswith("change") else f"{value:,.2f}"


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("run", help="a run's id or folder")
    parser.add_argument("--text", default="embedded", help="wikitext2, a file, or a corpus' held-out part")
    parser.add_argument("--limit", type=count, default=2, help="windows")
    parser.add_argument("--window", type=int, help="tokens of each; 2,048 by default")
    options = parser.parse_args()
    config, folder = opened(options.run)
    teacher = load_teacher(config.model)
    sequences = evaluation_windows(options.text, teacher.model, teacher.tokenizer, options.window, options.limit)
    precision = Precision(config, folder, teacher, sequences, progress)
    found = measured_rows(precision)
    print(f"{options.text}, {len(sequences)} windows of {sequences.shape[1]} tokens, {date.today()}")
    print(f"{torch.get_num_threads()} threads\n\n{tables(found, precision.act)}")
    if options.out:
        facts = {"windows": len(sequences), "window": sequences.shape[1]}
        write_report(options.out, "precision_cost", settings_of(options) | facts, found)


if __name__ == "__main__":
    main()
