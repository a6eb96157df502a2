"""Where a chart's marks are: axes with round ticks, intervals and bars in their places, what is not finite left out."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from lbllm.reporting.charts import Place, Value, axis, curves, plot, rows

finite = st.floats(-1e6, 1e6).map(lambda value: round(value, 4))


@given(st.lists(finite, min_size=1, max_size=12), st.booleans(), st.booleans())
def test_an_axis_holds_its_values_in_order(values: list[float], from_zero: bool, tight: bool) -> None:
    found = axis(values, from_zero=from_zero, tight=tight)
    assert found is not None
    places = [found.at(value) for value in sorted(values)]
    assert places == sorted(places)
    assert all(-1e-6 <= place <= 100 + 1e-6 for place in places)
    ticks = found.ticks
    assert len(ticks) <= 8
    assert [at for at, _ in ticks] == sorted(at for at, _ in ticks)
    assert len({text for _, text in ticks}) == len(ticks)
    # A tick stands where its own text says.
    for at, text in ticks:
        assert math.isclose(found.at(float(text.replace(",", ""))), at, abs_tol=0.5)


def test_values_that_differ_much_get_a_logarithmic_axis() -> None:
    found = axis([20.0, 40.0, 120_000.0])
    assert found is not None
    assert found.log
    assert math.isclose(found.at(math.sqrt(found.low * found.high)), 50)
    assert len(found.ticks) >= 3
    near = axis([20.0, 40.0])
    assert near is not None
    assert not near.log
    assert axis([math.nan, math.inf]) is None


def test_intervals_and_bars_are_drawn_where_they_belong() -> None:
    found = rows("t", [Value("a", "20", 20, 18, 23), Value("b", "30", 30, 29, 32), Value("c", "NaN", math.nan)])
    assert found is not None
    first, second, third = found.marks
    assert first.low is not None
    assert first.at is not None
    assert first.high is not None
    assert first.low < first.at < first.high < (second.low or 0)
    # The same length per unit everywhere.
    assert math.isclose((first.high - first.low) / 5, ((second.high or 0) - (second.low or 0)) / 3, rel_tol=0.01)
    assert third.at is None
    bars = rows("t", [Value("a", "1 MB", 1), Value("b", "100 MB", 100)], bars=True)
    assert bars is not None
    assert math.isclose((bars.marks[1].at or 0) / (bars.marks[0].at or 1), 100, rel_tol=0.02)
    assert not bars.log
    assert rows("t", []) is None


def test_lines_and_points_leave_out_what_is_not_finite() -> None:
    found = curves("t", "block", "loss", {("a", 1, False): [(1, 0.2), (2, math.nan), (3, 0.4)], ("b", 2, True): []})
    assert found is not None
    (line,) = found.lines
    assert len(line.points.split()) == 2
    assert line.points.startswith("0.00,")
    assert {text for _, text in found.x_ticks} <= {"1", "2", "3"}
    assert curves("t", "x", "y", {}) is None
    places = [Place("a", 2.0, 30.0, 1, best=True), Place("b", 3.0, 20.0, 2, best=True), Place("c", 2.5, math.inf, 3)]
    drawn = plot("t", "bits", "perplexity", places)
    assert drawn is not None
    assert [dot.number for dot in drawn.dots] == [1, 2]
    assert drawn.dots[0].x < drawn.dots[1].x
    assert drawn.dots[0].y < drawn.dots[1].y  # from the top: less is lower
    assert len(drawn.frontier.split()) == 3
    assert plot("t", "x", "y", places[:1]) is None
