"""The cost of a KV cache by position: the parts add up to the perplexity of evaluation."""

from __future__ import annotations

import argparse
import math

import pytest

from benchmarks.kv_cache import format_of, losses, measured, ranges, table
from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.measure.perplexity import perplexity
from lbllm.models.blocks import share_copy
from lbllm.quant.kv_cache import KVFormat
from tests.helpers.tiny_models import tiny
from tests.helpers.tiny_runs import token_ids


def test_ranges_cover_every_predicted_position_once() -> None:
    assert ranges(8192) == [(1, 256), (256, 512), (512, 1024), (1024, 2048), (2048, 4096), (4096, 8192)]
    assert ranges(300) == [(1, 256), (256, 300)]
    assert ranges(2) == [(1, 2)]


def test_formats_are_read() -> None:
    assert format_of("16") == KVFormat(16)
    assert format_of("4/64/1") == KVFormat(4, 64, 1)
    for wrong in ("3", "4/0/1", "4/64/-1", "four"):
        with pytest.raises(argparse.ArgumentTypeError):
            format_of(wrong)


def test_the_whole_is_the_perplexity_of_evaluation() -> None:
    model, _ = tiny("llama")
    windows = token_ids(2, seed=5).repeat(1, 3)[:, :60]
    formats = [KVFormat(16), KVFormat(4), KVFormat(4, 8, 1)]
    rows = measured(lambda: share_copy(model), formats, windows, lambda line: None)
    assert table(rows).count("\n") == len(rows) + 1
    for row, kv in zip(rows[-3:], formats, strict=True):
        other = share_copy(model)
        attach_kv_cache(other, kv)
        assert row["perplexity"] == pytest.approx(perplexity(other, windows).perplexity, rel=1e-5)
        assert row["bits"] == pytest.approx(kv.bits_per_value(12, 60))
    assert math.exp(float(losses(model, windows[0]).mean())) == pytest.approx(
        perplexity(model, windows[:1]).perplexity, rel=1e-5
    )
