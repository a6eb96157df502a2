"""One block tried out before a run, on the embedded model."""

import pytest

from lbllm.config import RunConfig, make_config
from lbllm.errors import ConfigError
from lbllm.measure.estimate import estimate
from lbllm.measure.preview import FORMATS, BlockSample, Point, Trained, choices, initialize, preview, take_block
from lbllm.sections import WHOLE_ROW


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return make_config("quick", {"quant": {"group_size": 64, "param_bits": 16}})


@pytest.fixture(scope="module")
def sample(config: RunConfig) -> BlockSample:
    return take_block(config, 12)


@pytest.fixture(scope="module")
def results(config: RunConfig, sample: BlockSample) -> list[Point | Trained]:
    return list(preview(sample, config))


@pytest.fixture(scope="module")
def points(results: list[Point | Trained]) -> list[Point]:
    return [result for result in results if isinstance(result, Point)]


def test_all_choices_are_measured_the_own_one_first(
    config: RunConfig, sample: BlockSample, points: list[Point]
) -> None:
    assert [(point.format, point.group_size) for point in points] == choices(sample, config)
    assert (points[0].format, points[0].group_size) == ("w1+1", 64)
    sizes = {fmt: {point.group_size for point in points if point.format == fmt} for fmt in FORMATS}
    fewer = {64, 256, WHOLE_ROW}
    assert sizes == {"w1+1": {64, 128, 256, WHOLE_ROW}, "w1": fewer, "w1+1+1": fewer}


def test_small_groups_and_four_levels_fit_better(points: list[Point]) -> None:
    error = {(point.format, point.group_size): point.error for point in points}
    for fmt in FORMATS:
        assert error[fmt, 64] < error[fmt, 256] < error[fmt, WHOLE_ROW]
    assert all(2 * error["w1+1", size] < error["w1", size] for size in (64, 256))


def test_bits_are_those_of_the_estimate(config: RunConfig, points: list[Point]) -> None:
    assert points[0].bpw == pytest.approx(estimate(config, rate=1e9).bpw)


def test_a_few_steps_of_stage_2_lower_the_error(points: list[Point], results: list[Point | Trained]) -> None:
    trained = [result for result in results if isinstance(result, Trained)]
    assert [step.step for step in trained] == [*range(1, trained[0].steps + 1), trained[0].steps]
    assert all(step.error is None for step in trained[:-1])
    last = trained[-1].error
    assert last is not None
    assert last < points[0].error


def test_known_choices_are_left_out(config: RunConfig, sample: BlockSample, points: list[Point]) -> None:
    known = {(point.format, point.group_size) for point in points} - {("w1", 256)}
    again = [result for result in preview(sample, config, known) if isinstance(result, Point)]
    assert [(point.format, point.group_size) for point in again] == [("w1+1", 64), ("w1", 256)]
    assert again[0] == points[0]


def test_overrides_hold_and_a_dense_block_is_refused(config: RunConfig, sample: BlockSample) -> None:
    overrides = {"*.down_proj": {"group_size": 32}}
    partly = make_config("quick", {"quant": {"group_size": 64, "param_bits": 16, "overrides": overrides}})
    assert 3 < initialize(sample, partly, "w1+1", 64).point.bpw < 4
    dense = make_config("quick", {"quant": {"skip": [f"{sample.path}.*"]}})
    with pytest.raises(ConfigError, match=r"model\.layers\.12 stays dense"):
        initialize(sample, dense, "w1+1", 64)


def test_a_block_that_is_not_there(config: RunConfig) -> None:
    with pytest.raises(ConfigError, match="blocks 0 to 29"):
        take_block(config, 30)
