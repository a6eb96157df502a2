"""What a sweep costs: the sum of its runs, and why it can't start, before anything is loaded."""

from __future__ import annotations

from collections import namedtuple
from pathlib import Path

import pytest

from lbllm.config import RunConfig, make_config
from lbllm.errors import ResourceError
from lbllm.measure import estimate as estimates
from lbllm.measure import sweep
from lbllm.measure.estimate import estimate
from lbllm.measure.sweep import WAITING_BYTES, estimate_sweep
from lbllm.models.teacher import skeleton
from lbllm.runs.sweep import planned
from tests.helpers.tiny_models import save_tiny

RATE = 1e10


def config(folder: Path, **changes: object) -> RunConfig:
    model = str(save_tiny(folder / "teacher", "llama"))
    base = {"model": model, "seq_len": 32, "device": "cpu", "quant": {"group_size": 16, "param_bits": 16}}
    return make_config("quick", base | changes)


def test_time_and_disk_are_the_sums_of_the_runs(tmp_path: Path) -> None:
    runs = planned(config(tmp_path), {"quant.group_size": [8, 16], "wat.epochs": [1, 3]})
    found = estimate_sweep(runs, tmp_path, rate=RATE)
    each = [estimate(one.config, rate=RATE) for one in runs]
    assert found.runs == tuple(each)
    assert found.seconds == pytest.approx(sum(one.seconds for one in each))
    assert found.disk_bytes == sum(sum(one.needs.disk.values()) for one in each)
    assert found.problems == ()
    known = skeleton(runs[0].config.model)
    assert estimate_sweep(runs, tmp_path, model=known, rate=RATE) == found


def test_what_some_runs_lack_is_said_with_their_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A row of the tiny model has 48 or 90 weights.
    runs = planned(config(tmp_path), {"quant.group_size": [16, 64, 512]})
    found = estimate_sweep(runs, tmp_path, rate=RATE)
    assert [result is None for result in found.runs] == [False, True, True]
    assert [problem.rpartition("(")[2] for problem in found.problems] == ["Group size 64)", "Group size 512)"]
    assert "longer than a row" in found.problems[0]
    # What all runs lack is said once, without their names.
    same = estimate_sweep(planned(config(tmp_path, corpus="wikipedia"), {"seed": [1, 2]}), tmp_path, rate=RATE)
    if same.problems:
        assert len(same.problems) == 1
        assert "Seed" not in same.problems[0]

    # Memory: the run at work and the workers that wait.
    seen = []

    def check(result: estimates.Estimate, device: str, processes: int = 1) -> None:
        seen.append(result.memory_bytes)
        raise ResourceError("the run needs more memory than is free")

    monkeypatch.setattr(sweep, "check_memory", check)
    runs = planned(config(tmp_path), {"seed": [1, 2, 3]})
    found = estimate_sweep(runs, tmp_path, rate=RATE)
    assert found.problems == ("the run needs more memory than is free",)
    alone = estimate(runs[0].config, rate=RATE).memory_bytes
    assert seen == [alone + 2 * WAITING_BYTES] * 3
    assert estimate_sweep(runs, tmp_path, rate=RATE, ignore_memory=True).problems == ()


def test_disk_space_is_that_of_all_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", ("total", "used", "free"))
    runs = planned(config(tmp_path), {"seed": [1, 2, 3]})
    needed = estimate_sweep(runs, tmp_path, rate=RATE).disk_bytes
    monkeypatch.setattr(sweep, "disk_usage", lambda folder: usage(0, 0, needed - 1))
    (problem,) = estimate_sweep(runs, tmp_path, rate=RATE).problems
    assert "the 3 runs need about" in problem
    assert str(tmp_path) in problem
