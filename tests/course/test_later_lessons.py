"""Lessons 6 to 10 on a tiny checkpoint: every figure is recomputed from its definition, every position works."""

from __future__ import annotations

import json
import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lbllm.checkpoints.find import open_model
from lbllm.course.block_training import Training
from lbllm.course.data import CourseData
from lbllm.course.inputs import even_quantizer, knee_quantizer, largest_channels, read_layers, round_apart
from lbllm.course.lesson import Figure, LessonMaker, Question, Scene
from lbllm.course.lessons import LESSONS
from lbllm.course.lessons.answers import ANSWER, SENTENCES, Answers
from lbllm.course.lessons.block_by_block import BlockByBlock
from lbllm.course.lessons.counting_bits import CountingBits
from lbllm.course.lessons.knee import Knee
from lbllm.course.lessons.massive_activations import MassiveActivations
from lbllm.measure.preview import initialize, take_block
from lbllm.microscope.effect import effect
from lbllm.microscope.hybrid import Only
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight, run_block
from lbllm.models.teacher import load_teacher
from lbllm.sections import WHOLE_ROW
from lbllm.stages.aar import KNEES
from tests.helpers.tiny_course import check_lesson, prepared, tiny_data, typed_digits

LATER = (BlockByBlock, MassiveActivations, Knee, CountingBits, Answers)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> CourseData:
    return tiny_data(tmp_path_factory.mktemp("course"))


@pytest.fixture(scope="module")
def lessons(data: CourseData) -> dict[str, LessonMaker]:
    return {maker.key: prepared(maker(data)) for maker in LATER}


def figure(scene: Scene, beginning: str) -> Figure:
    return next(one for one in scene.figures if one.label.startswith(beginning))


def right(question: Question | None) -> str:
    """The right option."""
    assert question is not None
    assert question.right is not None
    return question.options[question.right]


def picture(scene: Scene, kind: str) -> dict:
    return next(one.data for one in scene.pictures if one.kind == kind)


@pytest.mark.parametrize("maker", LATER, ids=lambda maker: maker.key)
def test_a_lesson_is_sound_at_all_positions(maker: type[LessonMaker], lessons: dict[str, LessonMaker]) -> None:
    check_lesson(lessons[maker.key])
    assert maker in LESSONS


@pytest.mark.parametrize("maker", LATER, ids=lambda maker: maker.key)
def test_no_number_is_typed_in_a_text(maker: type[LessonMaker]) -> None:
    assert typed_digits(maker) == []


def output_error(weight: torch.Tensor, x: torch.Tensor, rounded: torch.Tensor) -> float:
    """Mean over tokens of ||W x - W x_q||^2 / max(||W x||^2, ||W x_q||^2), in float64."""
    w = weight.double().numpy()
    clean, noisy = x.double().numpy() @ w.T, rounded.double().numpy() @ w.T
    scale = np.maximum((clean**2).sum(-1), (noisy**2).sum(-1))
    return float((((clean - noisy) ** 2).sum(-1) / scale).mean())


def test_massive_activations(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson = lessons["massive-activations"]
    _, layers = read_layers(data)
    errors = [output_error(one.weight, one.inputs, round_apart(one.inputs, even_quantizer(4), [])) for one in layers]
    worst = layers[int(np.argmax(errors))]
    assert lesson.lesson().inspect == str(worst.address)
    for apart in (0, 2):
        scene = lesson.scene((0, (0, 1, 2, 4).index(apart), 0))
        gone = largest_channels(worst.inputs, apart)
        rounded = round_apart(worst.inputs, even_quantizer(4), gone)
        error = figure(scene, "Error")
        assert error.value == pytest.approx(output_error(worst.weight, worst.inputs, rounded), rel=1e-3)
        rest = [channel for channel in range(worst.inputs.shape[1]) if channel not in gone]
        zeros = (rounded[:, rest] == 0).double().mean() - (worst.inputs[:, rest] == 0).double().mean()
        assert figure(scene, "Rounded inputs").value == pytest.approx(float(zeros), abs=1e-6)
        ratios = worst.inputs.abs().amax(-1) / worst.inputs.abs().median(-1).values
        token = worst.inputs[int(ratios.argmax()), rest].double()
        span = max(float(token.max()), 0.0) - min(float(token.min()), 0.0)
        assert figure(scene, "Distance").value == pytest.approx(span / 15, rel=1e-5)
        assert all(figure.text in scene.say for figure in (error, figure(scene, "Rounded inputs")))
        bars = picture(scene, "bars")["series"]
        assert sum(value is not None for value in bars[1]["values"]) == apart


def test_knee(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson = lessons["knee"]
    layer = next(one for one in read_layers(data)[1] if str(one.address) == lesson.lesson().inspect)
    x, sizes = layer.inputs, lesson.lesson().dials[1].values
    whole = []
    for at, knee in enumerate(KNEES):
        scene = lesson.scene((at, 0))
        expected = output_error(layer.weight, x, knee_quantizer(knee, WHOLE_ROW, 3)(x).detach())
        assert figure(scene, "Error").value == pytest.approx(expected, rel=1e-3)
        whole.append(expected)
    curve = picture(lesson.scene((2, 0)), "curve")
    assert curve["mark"] == 2
    np.testing.assert_allclose(curve["series"][0]["y"], 100 * np.array(whole), rtol=1e-3)
    assert [one["name"] for one in curve["series"]] == list(sizes)
    assert right(lesson.lesson().guess) == f"{KNEES[int(np.argmin(whole))]:.0%}"
    shortest = lesson.scene((3, len(sizes) - 1))
    assert sizes[-1] == "16"
    assert figure(shortest, "Error").value == pytest.approx(
        output_error(layer.weight, x, knee_quantizer(KNEES[3], 16, 3)(x).detach()), rel=1e-3
    )
    # The steps are those of the range that is shown, which the line's notes name.
    line = picture(shortest, "line")["points"]
    first = int(line[0]["note"].split()[1].rstrip(":"))
    ranges = [x[token, first : first + 16].double() for token in range(len(x))]
    spans = [max(float(r.max()), 0.0) - min(float(r.min()), 0.0) for r in ranges]
    shown = next(n for n, r in enumerate(ranges) if np.allclose([p["x"] for p in line], r, rtol=1e-4))
    assert figure(shortest, "Step inside").value == pytest.approx(KNEES[3] * spans[shown] / 9, rel=1e-5)


def test_counted_bits_are_those_in_the_file(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson = lessons["counting-bits"]
    scene = lesson.scene(lesson.lesson().start)
    file = data.found.folder / "model.safetensors"
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = {name: entry for name, entry in json.loads(raw[8 : 8 + length]).items() if name != "__metadata__"}
    sizes = {name: entry["data_offsets"][1] - entry["data_offsets"][0] for name, entry in table.items()}
    packed = [name.removesuffix(".params") for name in table if name.endswith(".params")]
    planes = sum(sizes[f"{name}.weight"] for name in packed)
    levels = sum(size for name, size in sizes.items() if ".params" in name)
    teacher = load_teacher(data.teacher_name).model
    weights = sum(teacher.get_parameter(f"{name}.weight").numel() for name in packed)
    assert figure(scene, "Bits that choose").value == pytest.approx(8 * planes / weights)
    assert figure(scene, "Bits of the levels").value == pytest.approx(8 * levels / weights)
    assert figure(scene, "Bits per binarized weight").value == pytest.approx(8 * (planes + levels) / weights)
    assert figure(scene, "Bits of the whole file").value == pytest.approx(8 * len(raw) / teacher.num_parameters())
    assert f"{len(raw):,}" in scene.say
    larger = 8 * (len(raw) + 9 * (planes + levels)) / (teacher.num_parameters() + 9 * weights)
    assert right(lesson.lesson().check) == f"{larger:.2f}"
    assert sum(picture(scene, "bars")["series"][0]["values"]) == pytest.approx(
        8 * (planes + levels) / weights, rel=1e-4
    )


def test_levels_of_all_groups(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson = lessons["counting-bits"]
    groups, params = lesson.lesson().dials
    teacher = load_teacher(data.teacher_name).model
    blocks = decoder_blocks(teacher)[1]
    layers = [linear_weight(layer) for block in blocks for layer in linear_layers(block).values()]
    shapes = [(layer.shape[0], layer.shape[1]) for layer in layers]
    weights = sum(rows * columns for rows, columns in shapes)
    for g, group in enumerate(groups.values):
        for p, bits in enumerate(params.values):
            levels = 0
            for rows, columns in shapes:
                count = 1 if group == "a whole row" else math.ceil(columns / int(group))
                # A row's scale, and a minimum and a step of each of four parameters in the layer; or these of each row.
                scales = {"4": 16 * rows + 8 * 16, "8": 8 * 16 * rows, "16": 0}[bits]
                levels += 4 * count * rows * int(bits) + scales
            scene = lesson.scene((g, p))
            assert figure(scene, "Bits of the levels").value == pytest.approx(levels / weights)


def test_a_block_trains(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson = lessons["block-by-block"]
    training = Training(data, 1)
    training.read()
    training.begin()
    config = training.config
    sample = take_block(config, 1)
    start = initialize(sample, config, data.quant.format, data.quant.group_size)
    first = figure(lesson.scene((0,)), "Error")
    assert first.value == pytest.approx(start.point.error, rel=1e-6)
    with torch.no_grad():
        clean = run_block(sample.block, sample.probe_inputs, sample.call)
    torch.testing.assert_close(clean, sample.probe_targets)
    assert figure(lesson.scene((0,)), "Weights with another level").value == 0
    assert [one.step for one in training.run()] == list(range(1, training.steps + 1))
    snapshots = training.snapshots
    curve = picture(lesson.scene((training.steps,)), "curve")
    np.testing.assert_allclose(curve["series"][0]["y"], [100 * one.error for one in snapshots], rtol=1e-3)
    assert curve["series"][1]["y"][0] is None
    last = figure(lesson.scene((training.steps,)), "Error")
    assert last.value < first.value
    changed = figure(lesson.scene((training.steps,)), "Weights with another level")
    assert 0 < changed.value < 0.5
    assert not any(module._forward_pre_hooks for module in data.teacher.model.modules())
    guess = lesson.lesson().guess
    assert guess.right == min(int(3 * last.value / first.value), 2)
    assert f"{last.value / first.value:.0%} of it is left" in guess.because


def test_a_training_is_guessed_before_it_begins(data: CourseData) -> None:
    maker = BlockByBlock(data)
    list(maker.prepare())
    before = maker.lesson()
    assert (before.guess.right, before.guess.because, before.check) == (None, "", None)
    steps = list(maker.watch())
    after = maker.lesson()
    assert after.complete
    assert (after.guess.text, after.guess.options, after.dials) == (
        before.guess.text,
        before.guess.options,
        before.dials,
    )
    # The curve grows, and then a group is seen, always the same one.
    known = [sum(y is not None for y in step.pictures[0].data["series"][0]["y"]) for step in steps]
    assert known == list(range(1, len(after.dials[0].values) + 1))
    assert len({step.pictures[1].label for step in steps if len(step.pictures) > 1}) == 1
    assert len(steps[-1].pictures) == 2


def test_the_group_that_is_shown_moves(data: CourseData, lessons: dict[str, LessonMaker]) -> None:
    lesson = lessons["block-by-block"]
    steps = len(lesson.lesson().dials[0].values) - 1
    lines = [picture(lesson.scene((step,)), "line") for step in (0, steps)]
    for line in lines:
        levels = np.array([level["x"] for level in line["levels"]])
        for point in line["points"]:
            assert np.abs(levels - point["x"]).argmin() == point["level"]
    assert any(a["level"] != b["level"] for a, b in zip(lines[0]["points"], lines[1]["points"], strict=True))
    assert (lines[0]["low"], lines[0]["high"]) == (lines[1]["low"], lines[1]["high"])


def test_answers(data: CourseData, lessons: dict[str, LessonMaker], tmp_path: Path) -> None:
    lesson = lessons["answers"]
    blocks = lesson.lesson().dials[0].values
    teacher, tokenizer = data.teacher.model, data.teacher.tokenizer
    student, _ = open_model(data.found.name)
    ids = tokenizer(SENTENCES[0], return_tensors="pt").input_ids
    with torch.no_grad():
        p, q = (model(input_ids=ids).logits[0].double().log_softmax(-1) for model in (teacher, student))
    kl = float((p.exp() * (p - q)).sum(-1)[:-1].mean())
    first, last = lesson.scene((0, 0)), lesson.scene((len(blocks) - 1, 0))
    assert (blocks[0], blocks[-1]) == ("0", "2")
    assert figure(first, "KL").value == pytest.approx(0, abs=1e-6)
    assert figure(last, "KL").value == pytest.approx(kl, rel=1e-3)
    assert figure(last, "Probability").value == pytest.approx(float(q[-1].exp().max()), rel=1e-3)
    assert right(lesson.lesson().guess) == f"“{str(tokenizer.decode([int(q[-1].argmax())])).strip() or '␣'}”"
    alone = sum(effect(data.pair, Only(number), SENTENCES[0]).hybrid.kl for number in range(2))
    assert right(lesson.lesson().check) == f"{alone:.2f}"
    rows = picture(last, "table")["rows"]
    assert [row[0] for row in rows] == ["0 of 2", "2 of 2"]
    assert ANSWER.temperature == 0
