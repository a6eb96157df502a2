"""A group as lesson 9 draws it: its bits, read back by hand, are its weights up to the rounding."""

from __future__ import annotations

import struct

import numpy as np
import pytest
import torch

from lbllm.course.counting import StoredGroup, store_group
from lbllm.sections import Format, ParamBits, QuantConfig


def stored(fmt: Format, group_size: int, bits: ParamBits, column: int = 0) -> tuple[torch.Tensor, StoredGroup]:
    rows = torch.randn(6, 40, generator=torch.Generator().manual_seed(0))
    return rows, store_group(rows, QuantConfig(format=fmt, group_size=group_size, param_bits=bits), column)


@pytest.mark.parametrize("fmt", ["w1+1", "w1"])
@pytest.mark.parametrize(("group_size", "column", "length"), [(16, 0, 16), (16, 20, 16), (16, 39, 8), (-1, 5, 40)])
@pytest.mark.parametrize("bits", [4, 8, 16])
def test_all_bits_are_counted(fmt: Format, group_size: int, column: int, length: int, bits: ParamBits) -> None:
    _, group = stored(fmt, group_size, bits, column)
    planes, params = (2, 4) if fmt == "w1+1" else (1, 2)
    assert len(group.signs) == length
    assert group.bits == planes * length + params * bits
    assert all(len(code) == bits and set(code) <= {"0", "1"} for _, code in group.params)


def test_the_bits_give_the_nearest_levels() -> None:
    rows, group = stored("w1+1", 16, 16, column=20)
    alpha_0, mu_0, alpha_1, mu_1 = (struct.unpack(">e", int(code, 2).to_bytes(2, "big"))[0] for _, code in group.params)
    weights = rows[0, 16:32].double().numpy()
    assert group.bitmap is not None
    sign = np.where(group.signs.numpy(), 1, -1)
    rebuilt = np.where(group.bitmap.numpy(), alpha_0 * sign + mu_0, alpha_1 * sign + mu_1)
    levels = np.array([mu_0 - alpha_0, mu_0 + alpha_0, mu_1 - alpha_1, mu_1 + alpha_1])
    best = np.abs(weights[:, None] - levels).min(-1)
    np.testing.assert_allclose(np.abs(weights - rebuilt), best, atol=2e-3)
