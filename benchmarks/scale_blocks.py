"""Blocks of real shapes held against the formulas of ``benchmarks.scale``.

    python -m benchmarks.scale_blocks REPORT...        reports of benchmarks.large, as its --out writes them

For each stage of a report: the FLOPs that the formulas give a block of this shape with this many tokens, the seconds
that they would take at the rate of matrix products that the report states, and the seconds that were measured. What the
formulas leave out (element-wise work, the columns of stage 1 one after another, experts that are computed again) is the
difference.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from benchmarks import markdown
from benchmarks.command_line import command_parser, one_message
from benchmarks.large import SHAPES
from benchmarks.report import settings_of, write_report
from benchmarks.scale import Shape, block_factors, block_rows, forward, reaching, statistics
from lbllm.config import RunConfig, make_config
from lbllm.errors import ConfigError
from lbllm.labels import STAGE_NAMES
from lbllm.sections import PAPER_STAGES, Stage


def shape_of(name: str) -> Shape:
    """The shape of a model of ``benchmarks.large``."""
    kind, settings = SHAPES[name]
    config: Any = AutoConfig.for_model(kind, **settings)
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    experts = getattr(config, "num_experts", 1)
    return Shape(
        name,
        config.num_hidden_layers,
        config.hidden_size,
        head * config.num_attention_heads,
        head * config.num_key_value_heads,
        config.moe_intermediate_size if experts > 1 else config.intermediate_size,
        config.vocab_size,
        experts=experts,
        active=getattr(config, "num_experts_per_tok", 1),
        tied=config.tie_word_embeddings,
    )


def work(shape: Shape, stage: Stage, tokens: int, config: RunConfig) -> float:
    """FLOPs of a block in a stage."""
    once = forward(shape, config.seq_len)
    if stage == "ptq":
        each = 2 * once + reaching(shape, config.seq_len) + statistics(shape)
        return tokens * each + block_factors(shape) + block_rows(shape, config.quant.group_size, config.ptq.sweeps)
    epochs = config.wat.epochs if stage == "wat" else config.aar.epochs
    return float(tokens * once * (2 + 3 * epochs))


def held(report: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The rows of a report's stages."""
    values = {row["label"]: row["value"] for row in report["rows"]}
    settings = report["settings"]
    shape, config = shape_of(settings["shape"]), make_config(settings.get("preset", "standard"))
    rate = 1e9 * values["matrix products"]
    for stage in PAPER_STAGES:
        seconds = values.get(f"{stage}: a block")
        if seconds is None:
            continue
        flops = work(shape, stage, settings["tokens"], config)
        yield {
            "label": shape.name,
            "weights": shape.weights / 1e9,
            "tokens": settings["tokens"],
            "stage": STAGE_NAMES[stage],
            "tflop": flops / 1e12,
            "ideal": flops / rate,
            "seconds": seconds,
            "share": flops / rate / seconds,
        }


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("reports", nargs="+", type=Path)
    given = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for path in given.reports:
        try:
            rows += held(json.loads(path.read_bytes()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} can't be read as a report of benchmarks.large ({error!r})") from None
    cells = [[f"{value:,.3g}" if isinstance(value, float) else str(value) for value in row.values()] for row in rows]
    print(markdown.table(list(rows[0]), cells))
    if given.out:
        write_report(given.out, "scale_blocks", settings_of(given), rows)


if __name__ == "__main__":
    main()
