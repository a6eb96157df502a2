"""Addresses: text and back, and texts that are none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lbllm.errors import ConfigError
from lbllm.microscope.address import EXAMPLE, Address
from tests.helpers.cases import cases

NUMBERS = st.integers(0, 999_999_999)
LAYERS = st.text("abcdefgh_.0123456789", min_size=1, max_size=40)


@cases(60)
@given(st.lists(NUMBERS, min_size=3, max_size=3), LAYERS, st.integers(0, 4))
def test_an_address_is_read_as_it_is_written(numbers: list[int], layer: str, length: int) -> None:
    parts = (numbers[0], layer, numbers[1], numbers[2])[:length]
    address = Address(*parts)  # type: ignore[arg-type]
    assert Address.parse(str(address)) == address
    assert str(address) == "/".join(map(str, parts))


def test_an_expert_needs_no_rule_of_its_own() -> None:
    address = Address.parse("3/mlp.experts.17.up_proj/5/0")
    assert (address.block, address.layer, address.row, address.group) == (3, "mlp.experts.17.up_proj", 5, 0)
    assert str(address.of_layer) == "3/mlp.experts.17.up_proj"


@pytest.mark.parametrize(
    "text",
    [
        "/",
        "one",
        "-1",
        "+1",
        "01",
        "1.0",
        "²",
        "٣",
        "1/",
        "1//2",
        "1/a/b",
        "1/a/2/3/4",
        "1/a b",
        " 1",
        "1\n",
        "1/a/2\n",
        "9" * 10,
        "1/" + "a" * 400,
        "1/../2/" + "x" * 10_000,
    ],
)
def test_another_text_is_named_with_an_example(text: str) -> None:
    with pytest.raises(ConfigError) as error:
        Address.parse(text)
    assert EXAMPLE in str(error.value)
    assert repr(text)[:50].rstrip("'") in str(error.value)
    assert len(str(error.value)) < 450


def test_no_part_follows_one_that_is_open() -> None:
    with pytest.raises(ValueError, match="open"):
        Address(1, None, 2)
