"""Sizes, durations, counts and measured numbers as people read them."""

from __future__ import annotations


def duration(seconds: float) -> str:
    """``0.4 s``, ``12 s``, ``3 min 20 s``, ``2 h 05 min``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(count: float) -> str:
    """Bytes in decimal units: ``12.3 MB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} GB"


def rows_left_out(count: int) -> str:
    """``1 row without text was left out``."""
    return f"{count:,} {'row' if count == 1 else 'rows'} without text {'was' if count == 1 else 'were'} left out"


def against_16_bits(count: float, parameters: int) -> str:
    """How a whole file, or a model's memory, of ``count`` bytes compares with the same model with 16 bits for each of
    its ``parameters``, embeddings included: "2.8 times smaller than in 16 bits"."""
    factor = 2 * parameters / count
    if 0.95 < factor < 1.05:
        return "about as large as in 16 bits"
    return (
        f"{factor:.1f} times smaller than in 16 bits"
        if factor > 1
        else f"{1 / factor:.1f} times larger than in 16 bits"
    )


def number_text(value: float) -> str:
    """Return a measured number as text with three or four digits: 1,234, 280.2, 3.00, 0.500, 0.0123; zero as 0."""
    size = abs(value)
    if not size < float("inf"):
        return "not a number" if value != value else "infinite"
    if size >= 1000:
        return f"{value:,.0f}"
    if size >= 100:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 1 else f"{value:#.3g}" if size else "0"
