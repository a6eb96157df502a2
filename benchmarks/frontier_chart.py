"""Draw the chart of the frontier: ``python -m benchmarks.frontier_chart docs/results/frontier.json docs/frontier.svg``.

Bits per weight against perplexity on WikiText-2, on a logarithmic scale, from the file that ``benchmarks.frontier
--out`` writes: a line for each method, through its rows from the fewest tokens, inputs left alone. Of a method that has
several rows at equal bits the best one counts. Rows above ``--most`` are left out, and the chart says so. The SVG is
readable on light and dark pages.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import Any

from benchmarks.command_line import one_message
from benchmarks.report import read_report
from lbllm.errors import ConfigError
from lbllm.files import write_file

WIDTH, HEIGHT = 860, 480
LEFT, RIGHT, TOP, BOTTOM = 64, 210, 44, 52
# Of the methods, ours first; each with a marker of its own, so that colours are not needed to tell them apart.
COLOURS = ("#0f6fde", "#d55e00", "#009e73", "#cc79a7", "#b8860b", "#8a63d2", "#c0392b", "#5b8a3c", "#6c7a89", "#2a9db0")
NAMES = {
    "ours": "ours",
    "rtn": "RTN",
    "gptq": "GPTQ",
    "bwa": "BWA",
    "billm": "BiLLM",
    "arb": "ARB-LLM",
    "hqq": "HQQ",
    "auto-round": "AutoRound",
    "gptqmodel": "GPTQModel",
    "efficient-qat": "EfficientQAT",
    "even": "even levels, our stages",
}
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #333 }
  .title { font-size: 15px; font-weight: 600 }
  .grid { stroke: #8884; stroke-width: 1 }
  .axis, .teacher { stroke: #888; stroke-width: 1 }
  .teacher { stroke-dasharray: 6 4 }
  .line { fill: none; stroke-width: 1.6; stroke-linejoin: round }
  .ours { stroke-width: 3 }
  @media (prefers-color-scheme: dark) { text { fill: #ddd } .grid { stroke: #fff3 } .axis, .teacher { stroke: #aaa } }
"""

Point = tuple[float, float]


def series(rows: Iterable[dict[str, Any]], text: str, most: float) -> tuple[dict[str, list[Point]], int]:
    """The points (bits, perplexity) of each method in ascending bits, ours first, and how many were left out above
    ``most``."""
    found: dict[str, dict[float, float]] = {}
    out = 0
    for row in rows:
        if row["inputs"] != "A16" or row["kind"] == "teacher" or row.get(text) is None:
            continue
        value, bits = float(row[text]), round(float(row["bits"]), 3)
        if not value <= most:
            out += 1
            continue
        points = found.setdefault("ours" if row["kind"] == "own" else str(row["method"]), {})
        points[bits] = min(value, points.get(bits, math.inf))
    order = [name for name in NAMES if name in found] + [name for name in found if name not in NAMES]
    return {name: sorted(found[name].items()) for name in order}, out


def marker(number: int, x: float, y: float, colour: str) -> str:
    """The marker of the method with this number, at x and y."""
    shape = number % 4
    if shape == 0:
        return f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4.5" fill="{colour}"/>'
    if shape == 1:
        return f'<rect x="{x - 4:.1f}" y="{y - 4:.1f}" width="8" height="8" fill="{colour}"/>'
    corners = {2: ((0, -5.5), (5, 4), (-5, 4)), 3: ((0, -5.5), (5.5, 0), (0, 5.5), (-5.5, 0))}[shape]
    points = " ".join(f"{x + a:.1f},{y + b:.1f}" for a, b in corners)
    return f'<polygon points="{points}" fill="{colour}"/>'


def ticks(low: float, high: float) -> list[float]:
    """Round values on a logarithmic axis."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    return [step * 10.0**k for k in decades for step in (1, 2, 3, 5) if low <= step * 10.0**k <= high]


def chart(rows: list[dict[str, Any]], text: str = "wikitext2", most: float = 1_000) -> str:
    """The SVG. Raises ConfigError if no row can be drawn."""
    fewest = min((row["tokens"] for row in rows if row["kind"] != "teacher"), default=0)
    drawn, out = series((row for row in rows if row["tokens"] == fewest), text, most)
    teacher = next((float(row[text]) for row in rows if row["kind"] == "teacher" and row["inputs"] == "A16"), None)
    points = [point for line in drawn.values() for point in line]
    if not points or teacher is None:
        raise ConfigError(f"no row with inputs left alone has a perplexity on {text} of at most {most:,}")
    first, last = (edge(bits for bits, _ in points) for edge in (min, max))
    first, last = math.floor(first * 10 - 0.5) / 10, math.ceil(last * 10 + 0.5) / 10
    low, high = teacher * 0.9, max(value for _, value in points) * 1.15

    def x(bits: float) -> float:
        return LEFT + (bits - first) / (last - first) * (WIDTH - LEFT - RIGHT)

    def y(value: float) -> float:
        return TOP + math.log(high / value) / math.log(high / low) * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<text class="title" x="{LEFT}" y="24">Perplexity on WikiText-2 from {fewest:,} tokens, weights only</text>'
    ]
    for value in ticks(low, high):
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for tenth in range(round(first * 10), round(last * 10) + 1, 2):
        at = x(tenth / 10)
        parts.append(f'<text x="{at:.1f}" y="{HEIGHT - BOTTOM + 20}" text-anchor="middle">{tenth / 10:.1f}</text>')
    foot, right = HEIGHT - BOTTOM, WIDTH - RIGHT
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{right}" y1="{foot}" y2="{foot}"/>')
    middle = (LEFT + right) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 12}" text-anchor="middle">bits per weight, all counted</text>')
    at = y(teacher)
    parts.append(f'<line class="teacher" x1="{LEFT}" x2="{right}" y1="{at:.1f}" y2="{at:.1f}"/>')
    parts.append(f'<text x="{right + 12}" y="{at + 4:.1f}">teacher, {teacher:.2f}</text>')
    for number, (name, line) in reversed(list(enumerate(drawn.items()))):
        colour = COLOURS[number % len(COLOURS)]
        path = " ".join(f"{x(bits):.1f},{y(value):.1f}" for bits, value in line)
        css = "line ours" if name == "ours" else "line"
        parts.append(f'<polyline class="{css}" points="{path}" stroke="{colour}"/>')
        parts += [marker(number, x(bits), y(value), colour) for bits, value in line]
        height = TOP + 8 + 22 * number
        parts.append(marker(number, right + 20, height, colour))
        parts.append(f'<text x="{right + 34}" y="{height + 4}">{escape(NAMES.get(name, name))}</text>')
    if out:
        height = TOP + 8 + 22 * len(drawn) + 10
        parts.append(f'<text x="{right + 12}" y="{height}">{out} rows above {most:,.0f} left out</text>')
    box = f'xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    label = "Bits per weight against perplexity for each method"
    return f'<svg {box} role="img" aria-label="{label}">\n<style>{STYLE}</style>\n' + "\n".join(parts) + "\n</svg>\n"


@one_message()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="what benchmarks.frontier --out wrote")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("--text", default="wikitext2")
    parser.add_argument("--most", type=float, default=1_000, help="the highest perplexity that is drawn")
    given = parser.parse_args()
    write_file(given.picture, chart(read_report(given.data).rows, given.text, given.most).encode())
    print(f"{given.picture} drawn")


if __name__ == "__main__":
    main()
