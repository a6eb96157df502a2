"""Where something lies in a model: a block, a layer in it, a row of its matrix, a group of this row.

    Address.parse("14/mlp.up_proj/211/7")    block 14, its layer mlp.up_proj, row 211, group 7
    Address.parse("14/mlp.up_proj")          the whole layer
    Address.parse("14"), Address.parse("")   the whole block, the whole model

Everything is counted from 0. A layer has the name that ``linear_layers`` gives it in its block, so that of an expert
(``mlp.experts.3.up_proj``) needs no rule of its own.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lbllm.errors import ConfigError
from lbllm.json_input import shown

_LONGEST = 300  # characters
_NUMBER = re.compile(r"0|[1-9][0-9]{0,8}")
_LAYER = re.compile(r"[^\s/]+")
EXAMPLE = "14/mlp.up_proj/211/7"


@dataclass(frozen=True)
class Address:
    """A place in a model; None from the first part that is left open. ``str(address)`` is the text that ``parse``
    reads."""

    block: int | None = None
    layer: str | None = None
    row: int | None = None
    group: int | None = None

    def __post_init__(self) -> None:
        parts = (self.block, self.layer, self.row, self.group)
        if None in parts and any(part is not None for part in parts[parts.index(None) :]):
            raise ValueError(f"an address has no parts after one that is open: {parts}")

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read an address. Raises ConfigError, with the text, if it is not one."""
        parts = text.split("/") if text else []
        block, layer, row, group = [*parts, *[None] * (4 - len(parts))][:4]
        fits = len(text) <= _LONGEST and len(parts) <= 4 and (layer is None or _LAYER.fullmatch(layer))
        if not fits or not all(part is None or _NUMBER.fullmatch(part) for part in (block, row, group)):
            raise ConfigError(
                f"{shown(text)} is not an address; write block/layer/row/group, counted from 0, for example "
                f"{EXAMPLE}, or only its first parts"
            )
        numbers = [None if part is None else int(part) for part in (block, row, group)]
        return cls(numbers[0], layer, numbers[1], numbers[2])

    def __str__(self) -> str:
        parts = (self.block, self.layer, self.row, self.group)
        return "/".join(str(part) for part in parts if part is not None)

    @property
    def of_layer(self) -> Address:
        """The address of the layer, without row and group."""
        return Address(self.block, self.layer)
