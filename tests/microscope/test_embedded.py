"""The shipped checkpoint beside the embedded model: its map adds up to what the checkpoint states."""

from __future__ import annotations

import pytest

from lbllm.microscope.microscope import Microscope


def test_the_shipped_checkpoint_is_seen_beside_its_teacher() -> None:
    found = Microscope.open("shipped")
    assert found.fingerprint == found.config.tensors_sha256
    rows = found.overview("bits").values
    bits = weights = 0.0
    for shapes, row in zip(found.shapes, rows, strict=True):
        for name, value in zip(found.layers, row, strict=True):
            size = shapes[name][0] * shapes[name][1]
            bits, weights = bits + (value or 0.0) * size, weights + (size if value is not None else 0)
    assert bits / weights == pytest.approx(found.config.bpw)
    layer = found.layer(f"{found.blocks - 1}/{found.layers[-1]}")
    assert 0 < layer.error < 0.5
    assert layer.sign_flips > 0
