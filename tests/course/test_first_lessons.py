"""Lessons 1 to 5 on tiny checkpoints: every figure is recomputed from its definition, every position works."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from lbllm.chat.pool import Loaded
from lbllm.course.data import CourseData
from lbllm.course.lesson import Figure, LessonMaker, Scene
from lbllm.course.lessons import LESSONS
from lbllm.course.lessons.bitmap import Bitmap
from lbllm.course.lessons.compensation import Compensation, rounded_in_turn, stops
from lbllm.course.lessons.em import COUNT, Em
from lbllm.course.lessons.one_bit import OneBit
from lbllm.course.lessons.what_a_weight_is import WhatAWeightIs
from lbllm.models.teacher import load_teacher
from lbllm.quant.levels import LEVELS
from lbllm.sections import QuantConfig
from tests.helpers.tiny_course import check_lesson, prepared, tiny_data, typed_digits

FIRST = (WhatAWeightIs, OneBit, Bitmap, Em, Compensation)
FORMATS = {
    "w1+1": QuantConfig(group_size=16),
    "w1": QuantConfig(format="w1", group_size=-1, param_bits=4),
}


@pytest.fixture(scope="module", params=FORMATS)
def data(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CourseData:
    return tiny_data(tmp_path_factory.mktemp("course"), ("ptq",), quant=FORMATS[request.param])


@pytest.fixture(scope="module")
def lessons(data: CourseData) -> dict[str, LessonMaker]:
    return {maker.key: prepared(maker(data)) for maker in FIRST}


def figure(scene: Scene, beginning: str) -> Figure:
    return next(one for one in scene.figures if one.label.startswith(beginning))


def picture(scene: Scene, label: str) -> dict:
    return next(one.data for one in scene.pictures if one.label.startswith(label))


def loss(exact: Tensor, rounded: np.ndarray) -> float:
    """||w - w_q||^2 / ||w||^2 in float64."""
    w = exact.double().numpy()
    return float(((w - rounded) ** 2).sum() / (w**2).sum())


def nearest(weights: Tensor, levels: list[float]) -> np.ndarray:
    """Each weight's nearest level, by trying all."""
    w, all_levels = weights.double().numpy(), np.array(levels, dtype=np.float64)
    return all_levels[np.abs(w[..., None] - all_levels).argmin(-1)]


@pytest.mark.parametrize("maker", FIRST, ids=lambda maker: maker.key)
def test_a_lesson_is_sound_at_all_positions(maker: type[LessonMaker], lessons: dict[str, LessonMaker]) -> None:
    check_lesson(lessons[maker.key])
    assert maker in LESSONS


@pytest.mark.parametrize("maker", FIRST, ids=lambda maker: maker.key)
def test_no_number_is_typed_in_a_text(maker: type[LessonMaker]) -> None:
    assert set(typed_digits(maker)) <= set(LEVELS)


def teacher_row(data: CourseData) -> Tensor:
    """The row that the lessons show, from the teacher itself."""
    at = data.example_group
    weight = load_teacher(data.teacher_name).model.get_submodule(f"model.layers.{at.block}.{at.layer}").weight
    assert isinstance(weight, Tensor)
    return weight.detach().float()[at.row]


def test_the_example_is_a_typical_group_of_a_large_layer(data: CourseData) -> None:
    layer, at = data.example, data.example_group
    assert at.block == 1  # of two
    assert layer.original.numel() == max(data.microscope.layer(f"1/{name}").original.numel() for name in data.blocks[1])
    torch.testing.assert_close(data.example_row, teacher_row(data))
    errors = []
    for row in range(layer.shape[0]):
        for group in range(layer.shape[1] // layer.length):
            view = layer.group(row, group)
            errors.append((loss(view.weights, view.rebuilt.double().numpy()), row, group))
    middle = sorted(errors)[len(errors) // 2][0]
    shown = layer.group(at.row or 0, at.group or 0)
    assert loss(shown.weights, shown.rebuilt.double().numpy()) == pytest.approx(middle, rel=1e-4)
    assert torch.equal(data.example_weights, shown.weights[:16])


def test_what_a_weight_is(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson, row = lessons["what-a-weight-is"].lesson(), teacher_row(data)
    ids = data.teacher.tokenizer(data.question, return_tensors="pt").input_ids
    seen: list[Tensor] = []
    at = data.example_group
    layer = data.teacher.model.get_submodule(f"model.layers.{at.block}.{at.layer}")
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0][0]))
    data.teacher.model(input_ids=ids)
    handle.remove()
    words = [str(data.teacher.tokenizer.decode([token])).strip() for token in ids[0].tolist()]
    for place in ((0, 0), (3, 1), (5, len(lesson.dials[1].values) - 1)):
        bits, word = (dial.values[position] for dial, position in zip(lesson.dials, place, strict=True))
        scene = lessons["what-a-weight-is"].scene(place)
        low = float(row.min().half())
        step = float(((row.max() - low) / (2 ** int(bits) - 1)).half())
        rounded = nearest(row, [low + step * n for n in range(2 ** int(bits))])
        assert figure(scene, "Error").value == pytest.approx(loss(row, rounded), rel=1e-4)
        rows, columns = data.example.shape
        assert figure(scene, "This layer, stored").value == rows * (columns * int(bits) + 32)
        x = seen[0][words.index(word)].double().numpy()
        exact, now = float(x @ row.double().numpy()), float(x @ rounded)
        assert f"“{word}” this row gives {exact:+.3f}" in scene.say
        assert f"it gives {now:+.3f}." in scene.say
        assert ("worse than no weights" in scene.say) == (figure(scene, "Error").value > 1)
        sums = picture(scene, "From inputs")["rows"][-1]
        assert [sums[3], sums[5]] == [f"{exact:.4f}", f"{now:.4f}"]


def test_one_bit(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    maker = lessons["one-bit"]
    weights, lesson = data.example_weights, maker.lesson()
    tried = []
    for place in lesson.positions():
        scene = maker.scene(place)
        levels = [level["x"] for level in picture(scene, "16 weights")["levels"]]
        error = figure(scene, "Error with your")
        assert error.value == pytest.approx(loss(weights, nearest(weights, levels)), rel=1e-3)
        assert error.text in scene.say
        tried.append(error.value)
        best = figure(scene, "Error with the best")
        grid = picture(scene, "Error in % for all places")
        assert grid["rows"][place[0]][place[1]] == pytest.approx(100 * error.value, rel=1e-3)
        for number, labels in enumerate((grid["row_labels"], grid["column_labels"])):
            assert [at for at, label in enumerate(labels) if "▸" in label] == [place[number]]
    assert best.value <= min(tried)
    values = sorted(weights.double().tolist())
    splits = [(values[:n], values[n:]) for n in range(1, len(values))]
    optimum = min(sum(float(np.var(part)) * len(part) for part in split) for split in splits)
    assert best.value == pytest.approx(optimum / float(np.square(values).sum()), rel=1e-4)


def test_bitmap(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    maker = lessons["bitmap"]
    assert isinstance(maker, Bitmap)
    lesson, (rows, columns) = maker.lesson(), data.example.shape
    own = data.example.length
    assert lesson.dials[1].values[lesson.dials[1].start] == str(own)
    for place in lesson.positions():
        scene, size = maker.scene(place), maker.sizes[place[1]]
        planes, count = place[0] + 1, (2, 4)[place[0]]
        params = data.example.fmt.param_bits
        scales = {4: rows + 2 * count, 8: 2 * rows * count, 16: 0}[params] * 16
        groups = -(-columns // size)
        stored = rows * -(-columns // 8) * 8 * planes + rows * groups * count * params + scales
        assert figure(scene, "Stored bits").value == pytest.approx(stored / (rows * columns))
        line = picture(scene, f"{min(16, size)} weights" if size != columns else "16 weights")
        levels = [level["x"] for level in line["levels"]]
        assert len(levels) == count
        for point in line["points"]:
            distances = [abs(point["x"] - level) for level in levels]
            assert distances[point["level"]] <= min(distances) + 1e-5
        parts = {part["kind"]: part["bits"] for part in picture(scene, "The bits")["parts"]}
        index = [point["level"] for point in line["points"]]
        assert parts["sign"] == "".join("01"[k >= count // 2] for k in index)
        assert parts.get("bitmap", "") == ("".join("01"[k in (0, 3)] for k in index) if count == 4 else "")
        middle, half = [(levels[-1] + levels[0]) / 2, (levels[-1] - levels[0]) / 2]
        pair = figure(scene, "Levels" if count == 2 else "Outer pair")
        assert pair.value == pytest.approx(half, abs=1e-4)
        assert pair.text == f"{middle:.3f} ± {half:.3f}" or pair.value == pytest.approx(half, abs=1e-5)
        errors = picture(scene, "Error in the first")["series"][0]["values"]
        assert errors[2 * place[0]] == pytest.approx(figure(scene, "Error").value, rel=1e-4)
        assert errors[2] < errors[0]


def test_fitted_levels_leave_no_more_than_even_ones(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    maker = lessons["bitmap"]
    assert isinstance(maker, Bitmap)
    rows = data.example_rows
    fmt = maker.format("w1+1", 16).model_copy(update={"param_bits": 16})
    even = []
    for row in rows:
        for start in range(0, len(row), 16):
            group = row[start : start + 16]
            even.append(nearest(group, np.linspace(float(group.min()), float(group.max()), 4).tolist()))
    assert maker.error(fmt).value < loss(rows, np.concatenate(even).reshape(rows.shape))


def test_em(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    maker = lessons["em"]
    assert isinstance(maker, Em)
    lesson, weights = maker.lesson(), maker.group[0, 0]
    row, stretch = maker.place
    assert torch.equal(weights, data.example_rows[row, stretch * len(weights) : (stretch + 1) * len(weights)])
    values = weights.double().numpy()
    for number, start in enumerate(lesson.dials[1].values):
        first = maker.scene((0, number))
        levels = np.array([level["x"] for level in first.pictures[0].data["levels"]])
        errors = []
        for step in range(len(lesson.dials[0].values)):
            if step % 2 == 0:
                index = np.abs(values[:, None] - levels).argmin(1)
            else:
                levels = np.array(
                    [values[index == k].mean() if (index == k).any() else levels[k] for k in range(COUNT)]
                )
            scene = maker.scene((step, number))
            errors.append(loss(weights, levels[index]))
            assert figure(scene, "Error after").value == pytest.approx(errors[-1], rel=1e-3)
            if step % 2 == 0:
                counts = np.bincount(index, minlength=COUNT)
                assert figure(scene, "Weights at").text == ", ".join(map(str, counts))
            else:
                shown = [float(level) for level in figure(scene, "Levels").text.split(", ")]
                np.testing.assert_allclose(shown, levels, atol=6e-4)
            shown = scene.pictures[1].data["series"][number if len(scene.pictures[1].data["series"]) > 1 else 0]["y"]
            np.testing.assert_allclose(
                [y for y in shown if y is not None][: step + 1], np.array(errors) * 100, rtol=1e-3
            )
        assert all(later <= earlier * (1 + 1e-6) for earlier, later in itertools.pairwise(errors)), start
        assert errors[-1] == pytest.approx(errors[-2], rel=1e-5)
    assert figure(scene, "Error of this program").value <= min(errors) * (1 + 1e-4)


def test_columns_in_turn_against_plain_loops() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    mixed = torch.randn(10, 10, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 10, generator=generator, dtype=torch.float64) @ mixed
    hessian = (x.T @ x).numpy()
    upper = np.linalg.cholesky(np.linalg.inv(hessian)).T
    found = list(rounded_in_turn(weight, torch.from_numpy(upper.copy()), 4, 2, 8))
    assert len(found) == 11
    torch.testing.assert_close(found[0], weight)
    now = weight.numpy().copy()
    for column in range(10):
        if column % 4 == 0:
            levels = []
            for row in now[:, column : column + 4]:
                ordered = np.sort(row)
                splits = [(ordered[:n], ordered[n:]) for n in range(1, len(row))] or [(ordered, ordered)]
                best = min(splits, key=lambda split: sum(((part - part.mean()) ** 2).sum() for part in split))
                levels.append([part.mean() for part in best])
        rounded = [min(pair, key=lambda level: abs(level - now[r, column])) for r, pair in enumerate(levels)]
        # The free columns move to the optimum of ||X (W - Q)||^2 given what is rounded so far.
        error = (now[:, column] - rounded) / upper[column, column]
        now[:, column] = rounded
        now[:, column + 1 :] -= np.outer(error, upper[column, column + 1 :])
        np.testing.assert_allclose(found[column + 1].numpy(), now, atol=1e-9)
        free = slice(column + 1, 10)
        gradient = (now - weight.numpy()) @ hessian
        np.testing.assert_allclose(gradient[:, free], 0, atol=1e-8)


@pytest.mark.parametrize("columns", [1, 2, 3, 48, 90, 576])
def test_stops_rise_from_none_to_all(columns: int) -> None:
    found = stops(columns)
    assert found[0] == 0
    assert found[-1] == columns
    assert found == sorted(set(found))
    assert 2 * len(found) <= 60


def test_compensation(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    maker = lessons["compensation"]
    assert isinstance(maker, Compensation)
    lesson, exact = maker.lesson(), data.example_rows
    assert len(maker.measured) > 0
    assert len(maker.learned) == 3 * len(maker.measured)
    x = maker.measured.double().numpy()
    for place in lesson.positions():
        scene = maker.scene(place)
        state = maker.states[("no", "yes")[place[1]]][place[0]]
        done = int(lesson.dials[0].values[place[0]])
        outputs = torch.from_numpy(x @ exact.double().numpy().T)
        found = loss(outputs, x @ state.double().numpy().T)
        assert figure(scene, "Error of the outputs").value == pytest.approx(found, rel=1e-3, abs=1e-9)
        assert [one.label for one in scene.figures] == ["Error of the outputs"], "the check can be read off"
        if place[1] == 0:  # only what is rounded has changed
            torch.testing.assert_close(state[:, done:], exact[:, done:])
        curve = scene.pictures[2].data
        shown = [y for y in curve["series"][-1 if place[1] else 0]["y"] if y is not None]
        assert shown[place[0]] == pytest.approx(100 * found, rel=1e-3, abs=1e-7)
    last = len(lesson.dials[0].values) - 1
    alone, passed = (figure(maker.scene((last, mode)), "Error of the outputs").value for mode in (0, 1))
    assert passed < alone
    for mode, states in maker.states.items():
        assert maker.weight_error(mode).value == pytest.approx(loss(exact, states[-1].double().numpy()), rel=1e-4)
    stored = loss(data.example.original, data.example.rebuilt.double().numpy())
    assert lesson.check is not None
    assert f"{stored:.2%}" in lesson.check.because


def test_a_second_course_is_the_same(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    other = CourseData(data.found, data.teacher_name, lambda name: data.teacher)
    for maker in FIRST:
        again, first = prepared(maker(other)), lessons[maker.key]
        assert again.lesson() == first.lesson()
        start = again.lesson().start
        assert again.scene(start) == first.scene(start)


def test_no_model_is_loaded_before_a_lesson_needs_it(data: CourseData) -> None:
    loaded: list[str] = []

    def load(name: str) -> Loaded:
        loaded.append(name)
        return data.teacher

    lazy = CourseData(data.found, data.teacher_name, load)
    for maker in (OneBit, Bitmap, Em):
        prepared(maker(lazy)).lesson()
    assert loaded == []
    prepared(WhatAWeightIs(lazy)).lesson()
    assert loaded == [data.teacher_name]
