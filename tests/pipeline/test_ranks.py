"""Two processes on one run, against one: exchanged tensors, statistics, losses, and the end of one of them."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from lbllm import ranks
from lbllm.events import BlockDone, RunDone, RunStarted
from lbllm.stages.hessians import input_statistics
from tests.helpers import two_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have worked, and one has been killed."""
    folder = tmp_path_factory.mktemp("ranks")
    first, second = two_ranks.start(folder)
    _, said = first.communicate(timeout=300)
    assert first.returncode == 0, said
    assert second.wait(60) == -signal.SIGKILL, second.communicate()[1]
    return folder


@pytest.fixture(scope="module")
def found(folder: Path) -> list[dict[str, Any]]:
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(2)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[BlockDone]:
    """The blocks of the same run on one process."""
    folder = tmp_path_factory.mktemp("alone")
    return [event for event in two_ranks.events(folder) if isinstance(event, BlockDone)]


def test_what_ranks_exchange_is_the_same_on_both(found: list[dict[str, Any]]) -> None:
    for rank, seen in enumerate(found):
        assert [tensor.unique().tolist() for tensor in seen["sums"]] == [[3.0], [3.0], [2.0]]
        assert seen["same"] == {"rank": 0}
        assert seen["mean"] == pytest.approx(((1 + 2 * 3) / 4, 5.0))
        assert seen["gathered"].flatten().tolist() == list(range(14))
        # Neighbours together, the ranks in turn; a sequence's number in the share is its place there.
        assert seen["share"].tolist() == [[0, 1, 4, 5, 8, 9], [2, 3, 6, 7, 10]][rank]
        assert seen["share"][seen["mine"]].tolist() == [[9, 0], [2, 10, 3, 6]][rank]


def test_statistics_of_two_processes_are_those_of_one_to_rounding(found: list[dict[str, Any]]) -> None:
    seen, meant = two_ranks.batches()
    exact = input_statistics([x.double() for x in seen], [x.double() for x in meant])
    for one in found:
        for statistic, reference in zip(one["statistics"], exact, strict=True):
            torch.testing.assert_close(statistic.double(), reference.double(), rtol=1e-5, atol=1e-5)


def test_losses_of_two_processes_are_those_of_one(found: list[dict[str, Any]], alone: list[BlockDone]) -> None:
    first, second = (one["losses"] for one in found)
    assert [(event.stage, event.block) for event in first] == [(event.stage, event.block) for event in alone]
    for one, other, expected in zip(first, second, alone, strict=True):
        assert (one.loss_before, one.loss_after) == (other.loss_before, other.loss_after)
        assert one.loss_before == pytest.approx(expected.loss_before, rel=0.01)
        assert one.loss_after == pytest.approx(expected.loss_after, rel=0.01)


def test_a_run_that_lost_a_rank_goes_on_alone(folder: Path, alone: list[BlockDone]) -> None:
    assert (folder / "lost").read_text() == "True"
    events = list(two_ranks.events(folder / "killed"))
    started = next(event for event in events if isinstance(event, RunStarted))
    assert started.resumed_blocks == 3  # stage 1, and the first block of stage 2
    assert isinstance(events[-1], RunDone)
    for event, expected in zip((e for e in events if isinstance(e, BlockDone)), alone[3:], strict=True):
        assert event.loss_after == pytest.approx(expected.loss_after, rel=0.01)


def test_one_process_exchanges_nothing() -> None:
    tensor, rows = torch.arange(3.0), torch.tensor([2, 0])
    ranks.sum_(tensor)
    ranks.barrier()
    assert (ranks.count(), ranks.rank(), ranks.is_first()) == (1, 0, True)
    ranks.gather_(tensor)
    assert ranks.Share(3, 2).of(tensor) is tensor
    assert torch.equal(ranks.Share(3, 2).mine(rows), rows)
    assert (ranks.same(tensor), ranks.mean(2.5, 0)) == (tensor, 2.5)
    assert not ranks.is_loss(RuntimeError("Connection closed by peer"))
