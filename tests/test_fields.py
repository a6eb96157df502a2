"""What a Field allows, for widgets and in words."""

from __future__ import annotations

from typing import Literal

import pytest
from pydantic import BaseModel, Field

from lbllm.fields import allowed, bounds, choices


class Model(BaseModel):
    whole: int = Field(1, gt=0, lt=2_000)
    share: float = Field(0.5, ge=0, lt=1)
    rate: float = Field(0.5, gt=0)
    bits: Literal[4, 8, 16] = Field(4)
    one: Literal["only"] = Field("only")
    text: str = Field("")


@pytest.mark.parametrize(
    ("name", "values", "ends", "words"),
    [
        ("whole", (), (1, 1_999), "above 0, below 2,000"),
        ("share", (), (0, 1), "at least 0, below 1"),
        ("rate", (), (0, None), "above 0"),
        ("bits", (4, 8, 16), (None, None), "4, 8 or 16"),
        ("one", ("only",), (None, None), "only"),
        ("text", (), (None, None), ""),
    ],
)
def test_choices_bounds_and_words(
    name: str, values: tuple[object, ...], ends: tuple[float | None, float | None], words: str
) -> None:
    field = Model.model_fields[name]
    assert (choices(field), bounds(field), allowed(field)) == (values, ends, words)
