"""Work on the rows of a weight in parts: what is computed on the way takes a bounded amount of memory."""

from __future__ import annotations

# Temporary tensors of a part of the rows take about this many bytes, whatever the size of the layer.
CHUNK_BYTES = 256_000_000


def row_chunks(rows: int, row_bytes: int) -> list[slice]:
    """Divide ``rows`` into parts of equal length, up to rounding; a row needs ``row_bytes`` of temporary tensors.

    No part is a small remainder: a matrix product with one or two columns is rounded differently from a wide one.
    """
    parts = min(rows, -(-rows * row_bytes // CHUNK_BYTES)) or 1
    length = -(-rows // parts)
    return [slice(start, min(start + length, rows)) for start in range(0, max(rows, 1), max(length, 1))]
