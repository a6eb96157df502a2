"""A run's events, its end on request, its continuation from any blocks, and what becomes of bad settings and values."""

from __future__ import annotations

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from benchmarks.kill_resume import hashes
from lbllm import load
from lbllm.config import RunConfig
from lbllm.errors import CheckpointError, ConfigError, LbllmError, ModelError
from lbllm.events import (
    EVENT,
    BlockDone,
    BlockStarted,
    Evaluated,
    Event,
    LayerDone,
    RunDone,
    RunStarted,
    RunStopped,
    StageDone,
    StageStarted,
    StepMetric,
)
from lbllm.measure.perplexity import HELD_OUT_TOKENS, perplexity
from lbllm.models.blocks import decoder_blocks, linear_layers, linear_weight
from lbllm.models.teacher import Teacher
from lbllm.pipeline import run as pipeline
from lbllm.pipeline.blockwise import is_divergence
from lbllm.pipeline.packed_model import stage_model
from lbllm.sections import PAPER_STAGES
from lbllm.texts.corpus import Corpus, load_corpus, sequences_hash
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

BLOCKS = 2
LAYERS = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.o_proj"), (48, 48)),
    **dict.fromkeys(("self_attn.k_proj", "self_attn.v_proj"), (24, 48)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (90, 48)),
    "mlp.down_proj": (48, 90),
}
STATES = list(itertools.product(PAPER_STAGES, range(BLOCKS)))


@pytest.fixture
def teacher() -> Teacher:
    return tiny_teacher("llama")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """The folder and the events of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_tiny(run_config(), folder, tiny_teacher("llama"))


def state_file(folder: Path, stage: str, block: int) -> Path:
    return folder / "blocks" / f"{stage}-{block:04d}.safetensors"


def started_again_from(folder: Path, target: Path, states: Sequence[tuple[str, int]]) -> Path:
    """A new run folder that holds some finished blocks of another."""
    (target / "blocks").mkdir(parents=True)
    for stage, block in states:
        shutil.copy(state_file(folder, stage, block), target / "blocks")
    return target


def assert_same_state(one: Path, other: Path) -> None:
    with safe_open(one, "pt") as left, safe_open(other, "pt") as right:
        # The order in which metadata are written is not fixed, so the files needn't be equal.
        assert left.metadata() == right.metadata()
        assert left.keys() == right.keys()
        assert all(torch.equal(left.get_tensor(name), right.get_tensor(name)) for name in left.keys())  # noqa: SIM118


def done_blocks(events: list[Event]) -> dict[tuple[str, int], BlockDone]:
    return {(event.stage, event.block): event for event in events if isinstance(event, BlockDone)}


def test_events_tell_the_run_in_order(whole: tuple[Path, list[Event]]) -> None:
    folder, events = whole
    told: Iterator[Event] = iter(events)
    config = run_config()
    started = next(told)
    weights = BLOCKS * sum(rows * columns for rows, columns in LAYERS.values())
    # 16 weights share four 16-bit parameters; the last group of a row of 90 has 10. A row of planes is whole bytes.
    bits = BLOCKS * sum(
        rows * (math.ceil(columns / 16) * 4 * 16 + math.ceil(columns / 8) * 8 * 2) for rows, columns in LAYERS.values()
    )
    assert started == RunStarted(
        stages=PAPER_STAGES,
        blocks=BLOCKS,
        layers=BLOCKS * len(LAYERS),
        weights=weights,
        device="cpu",
        corpus_hash=sequences_hash(token_ids()),
        tokens=token_ids().numel(),
        bpw=bits / weights,
    )
    for stage in PAPER_STAGES:
        steps = 0 if stage == "ptq" else 2
        assert next(told) == StageStarted(stage=stage, steps=steps)
        for block in range(BLOCKS):
            assert next(told) == BlockStarted(stage=stage, block=block)
            if stage == "ptq":
                layers = [next(told) for _ in LAYERS]
                assert all(isinstance(event, LayerDone) and 0 < event.error < 50 for event in layers)
                assert [(event.stage, event.block) for event in layers] == [(stage, block)] * len(LAYERS)  # type: ignore[union-attr]
                assert {event.layer for event in layers} == set(LAYERS)  # type: ignore[union-attr]
            for step in range(1, steps + 1):
                metric = next(told)
                assert isinstance(metric, StepMetric)
                assert (metric.stage, metric.block, metric.step) == (stage, block, step)
                assert 0 < metric.loss < 1
                assert metric.tokens_per_second > 0
            done = next(told)
            assert isinstance(done, BlockDone)
            assert (done.stage, done.block) == (stage, block)
            # The first block gets its inputs from the teacher itself; its targets are rounded to bfloat16.
            assert (done.loss_before < 1e-5) == (stage == "ptq" and block == 0)
            assert not done.diverged or done.loss_before == done.loss_after
            assert done.memory_bytes > 1e8
        assert isinstance(next(told), StageDone)
    done_run = next(told)
    assert isinstance(done_run, RunDone)
    assert done_run.path == str(folder / "checkpoint")
    assert done_run.bpw == started.bpw
    assert list(told) == []
    assert config.tokens == started.tokens


def test_each_stage_starts_where_the_one_before_ended(whole: tuple[Path, list[Event]]) -> None:
    done = done_blocks(whole[1])
    # The same block on the same inputs, measured on the same tokens.
    assert done["wat", 0].loss_before == pytest.approx(done["ptq", 0].loss_after, rel=1e-5)


def test_perplexities_on_the_held_out_text_come_as_they_become_known_and_once(teacher: Teacher, tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    rng = random.Random(0)
    documents = [" ".join(rng.choices(["moon", "tide", "river", "stone", "a", "the"], k=40)) for _ in range(200)]
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    config, folder = run_config(corpus=str(text)), tmp_path / "run"
    folder.mkdir()
    (folder / "precision").write_text("no")
    events = list(pipeline.run(config, folder, request=lambda: None, teacher=teacher))
    marks = [event for event in events if isinstance(event, Evaluated | RunStarted | StageDone | RunDone)]
    assert [getattr(event, "what", event.kind) for event in marks] == [
        *("run_started", "teacher", "stage_done", "ptq", "stage_done", "wat", "stage_done", "aar", "run_done")
    ]
    windows = load_corpus(
        str(text), teacher.tokenizer, seq_len=config.seq_len, tokens=HELD_OUT_TOKENS, part="heldout"
    ).sequences
    for event in marks:
        if isinstance(event, Evaluated):
            model = teacher.model if event.what == "teacher" else stage_model(config, folder, event.what, teacher)  # type: ignore[arg-type]
            assert event.perplexity == pytest.approx(perplexity(model, windows).perplexity, rel=1e-5)
            assert event.tokens == windows[:, 1:].numel()
    again = list(pipeline.run(config, folder, request=lambda: None, teacher=teacher))
    assert not any(isinstance(event, Evaluated) for event in again)
    # What is damaged is measured again; a damaged precision is chosen again.
    measured = [event for event in events if isinstance(event, Evaluated)]
    file = folder / "blocks" / "evaluated.json"
    whole = file.read_bytes()
    place = whole.index(b"teacher") + 11
    (folder / "precision").write_bytes(b"no\n")
    for damaged in (b"", whole[: len(whole) // 2], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
        file.write_bytes(damaged)
        again = list(pipeline.run(config, folder, request=lambda: None, teacher=teacher))
        assert [event for event in again if isinstance(event, Evaluated)] == measured
        assert file.read_bytes() == whole


SUBSETS = [
    [],
    STATES[:1],
    STATES[:3],
    STATES[:-1],
    STATES,
    [state for state in STATES if state[1] == 1],
    [state for state in STATES if state[0] != "ptq"],
    *(random.Random(seed).sample(STATES, 3) for seed in range(3)),
]


@pytest.mark.parametrize("states", SUBSETS, ids=lambda states: "+".join(f"{stage}{block}" for stage, block in states))
def test_a_run_goes_on_from_any_finished_blocks_to_the_same_bytes(
    whole: tuple[Path, list[Event]], states: list[tuple[str, int]], teacher: Teacher, tmp_path: Path
) -> None:
    folder = started_again_from(whole[0], tmp_path / "run", states)
    events = run_tiny(run_config(), folder, teacher)
    started = events[0]
    assert isinstance(started, RunStarted)
    assert started.resumed_blocks == len(states)
    assert set(done_blocks(events)) == set(STATES) - set(states)
    assert hashes(folder / "checkpoint") == hashes(whole[0] / "checkpoint")
    for stage, block in STATES:
        assert_same_state(state_file(folder, stage, block), state_file(whole[0], stage, block))


@pytest.mark.parametrize(
    "kind",
    [RunStarted, StageStarted, BlockStarted, LayerDone, StepMetric, BlockDone, StageDone],
    ids=lambda k: k.__name__,
)
def test_a_stop_is_obeyed_within_a_step_and_the_work_is_kept(
    whole: tuple[Path, list[Event]], kind: type, teacher: Teacher, tmp_path: Path
) -> None:
    moments = [index for index, event in enumerate(whole[1]) if isinstance(event, kind)]
    moment = moments[len(moments) // 2]
    after: list[Event] = []
    before: list[Event] = []
    asked = False
    (tmp_path / "precision").write_text("no")
    corpus = Corpus("given", sequences_hash(token_ids()), token_ids())
    run = pipeline.run(
        run_config(), tmp_path, request=lambda: "stop" if asked else None, teacher=teacher, corpus=corpus
    )
    for index, event in enumerate(run):
        (after if asked else before).append(event)
        asked = asked or index == moment
    assert after[-1] == RunStopped(request="stop")
    # At most the step, or the layer, that was under way; a block's start or end is no work.
    assert sum(isinstance(event, StepMetric | LayerDone) for event in after) <= 1
    assert not any(isinstance(event, BlockStarted | RunDone) for event in after)
    kept = set(done_blocks(before)) | set(done_blocks(after))
    assert {path.name for path in (tmp_path / "blocks").iterdir()} == {state_file(tmp_path, *s).name for s in kept}
    assert not (tmp_path / "checkpoint").exists()
    events = run_tiny(run_config(), tmp_path, teacher)
    assert isinstance(events[0], RunStarted)
    assert events[0].resumed_blocks == len(kept)
    assert hashes(tmp_path / "checkpoint") == hashes(whole[0] / "checkpoint")


def test_a_finished_run_is_only_written_again(
    whole: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(whole[0], tmp_path / "run"))
    (folder / "checkpoint" / "stale").touch()
    events = run_tiny(run_config(), folder, teacher)
    assert not any(isinstance(event, BlockStarted | StepMetric) for event in events)
    assert hashes(folder / "checkpoint") == hashes(whole[0] / "checkpoint")


@pytest.mark.parametrize(
    "changes",
    [{"seed": 1}, {"quant": {"group_size": 12}}, {"quant": {"kv_bits": 8}}, {"wat": {"lr_weight": 2e-3}},
     {"ptq": {"damping": 0.02}}, {"aar": {"epochs": 2}}],
    ids=str,
)  # fmt: skip
def test_other_settings_never_take_over_the_blocks(
    whole: tuple[Path, list[Event]], changes: dict[str, Any], teacher: Teacher, tmp_path: Path
) -> None:
    folder = started_again_from(whole[0], tmp_path / "run", STATES)
    with pytest.raises(CheckpointError, match=r"was made with another .* use another folder"):
        run_tiny(run_config(**changes), folder, teacher)
    assert hashes(folder / "blocks") == hashes(whole[0] / "blocks")


def test_another_model_text_or_precision_never_takes_over_the_blocks(
    whole: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    folder = started_again_from(whole[0], tmp_path / "run", STATES)
    with pytest.raises(CheckpointError, match="another"):
        run_tiny(run_config(), folder, tiny_teacher("llama", seed=1))
    with pytest.raises(CheckpointError, match="another"):
        run_tiny(run_config(), folder, teacher, precision="bf16")
    (folder / "precision").write_text("no")
    corpus = Corpus("given", "another", token_ids(seed=1))
    with pytest.raises(CheckpointError, match="another"):
        list(pipeline.run(run_config(), folder, request=lambda: None, teacher=teacher, corpus=corpus))


def test_a_damaged_block_is_named_and_done_again_once_it_is_deleted(
    whole: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    folder = started_again_from(whole[0], tmp_path / "run", STATES)
    path = state_file(folder, "wat", 1)
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(CheckpointError, match=r"wat-0001\.safetensors is damaged .*delete it and resume"):
        run_tiny(run_config(), folder, teacher)
    path.unlink()
    assert set(done_blocks(run_tiny(run_config(), folder, teacher))) == {("wat", 1)}
    assert hashes(folder / "checkpoint") == hashes(whole[0] / "checkpoint")


def test_a_later_stage_can_be_added_to_a_finished_run(
    whole: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    run_tiny(run_config(stages=["ptq"]), tmp_path, teacher)
    with pytest.raises(CheckpointError, match="block 0 has not finished stage wat; resume the run"):
        stage_model(run_config(), tmp_path, "wat", teacher)
    events = run_tiny(run_config(), tmp_path, teacher)
    assert set(done_blocks(events)) == set(STATES[BLOCKS:])
    assert hashes(tmp_path / "checkpoint") == hashes(whole[0] / "checkpoint")


def test_stages_one_and_two_leave_activations_and_cache_alone(
    whole: tuple[Path, list[Event]], teacher: Teacher
) -> None:
    ids = token_ids(2, seed=1)
    with torch.no_grad():
        outputs = [stage_model(run_config(), whole[0], stage, teacher)(ids) for stage in PAPER_STAGES]
        dense = teacher.model(ids).logits
    assert [type(output.past_key_values.layers[0]).__name__ for output in outputs] == [
        "DynamicLayer",
        "DynamicLayer",
        "PackedKVLayer",
    ]
    errors = [float((output.logits - dense).square().mean()) for output in outputs]
    assert 0 < max(errors[:2]) < errors[2]


def snapshot(teacher: Teacher) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in teacher.model.state_dict().items()}


@pytest.mark.parametrize("architecture", ["llama_bias", "gpt2"])
def test_the_teacher_is_not_changed(architecture: str, tmp_path: Path) -> None:
    teacher = tiny_teacher(architecture)
    before, config, layers = snapshot(teacher), teacher.model.config.to_dict(), str(teacher.model)
    run_tiny(run_config(), tmp_path, teacher)
    stage_model(run_config(), tmp_path, "aar", teacher)
    after = teacher.model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert teacher.model.config.to_dict() == config
    assert str(teacher.model) == layers
    assert all(parameter.grad is None for parameter in teacher.model.parameters())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in teacher.model.modules())


@pytest.mark.parametrize(
    ("stage", "setting", "rate"),
    [
        ("wat", "lr_weight", 1e30),
        ("wat", "lr_weight", 1e300),
        ("wat", "lr_levels", 1e30),
        ("aar", "lr_levels", 1e30),
        ("aar", "lr_act", 1e30),
        ("aar", "lr_act", 1e38),
        ("aar", "lr_act", 1e300),
    ],
)
def test_a_block_that_diverges_keeps_what_it_had(
    whole: tuple[Path, list[Event]], stage: str, setting: str, rate: float, teacher: Teacher, tmp_path: Path
) -> None:
    config = run_config(**{stage: {setting: rate}})
    events = run_tiny(config, tmp_path, teacher)
    done = done_blocks(events)
    for (at, _), ended in done.items():
        assert math.isfinite(ended.loss_before)
        if at == stage:
            assert ended.diverged
            assert ended.loss_after == ended.loss_before
    assert isinstance(events[-1], RunDone)
    with torch.no_grad():
        model = stage_model(config, tmp_path, stage, teacher)  # type: ignore[arg-type]
        assert model(token_ids(2, seed=1)).logits.isfinite().all()
        if stage == "wat":
            # Nothing of what was trained is left: stage 1's weights come out of stage 2.
            earlier = stage_model(config, tmp_path, "ptq", teacher)
            before, after = earlier.state_dict(), model.state_dict()
            assert before.keys() == after.keys()
            assert all(torch.equal(before[name], after[name]) for name in before)
    # A loss that is no number survives the event store.
    for event in events:
        told = EVENT.validate_json(event.model_dump_json())
        assert told == event or "nan" in repr(event)
        assert repr(told) == repr(event)


@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["mlp.up_proj.weight", "self_attn.q_proj.weight", "input_layernorm.weight"])
def test_a_teacher_with_broken_weights_is_told_by_its_block(
    name: str, value: float, teacher: Teacher, tmp_path: Path
) -> None:
    weight = teacher.model.get_submodule("model.layers.1").get_parameter(name)
    weight.view(-1)[3] = value
    with pytest.raises(ModelError, match=r"tiny: model\.layers\.1 gives values that are not finite .*another copy"):
        run_tiny(run_config(), tmp_path, teacher)
    # What was finished before stays.
    assert [path.name for path in (tmp_path / "blocks").iterdir()] == ["ptq-0000.safetensors"]


def test_what_stage_one_cannot_solve_is_told_by_its_layer(teacher: Teacher, tmp_path: Path) -> None:
    with pytest.raises(LbllmError, match=r"model\.layers\.0\.self_attn\.q_proj.*not finite.*ptq\.tokens"):
        run_tiny(run_config(ptq={"damping": 1e38}), tmp_path / "damped", teacher)
    teacher.model.get_submodule("model.layers.1").get_parameter("self_attn.q_proj.weight").mul_(1e30)
    with pytest.raises(
        LbllmError, match=r"model\.layers\.1\.self_attn\.q_proj: its levels reach .*float16.*quant\.skip"
    ):
        run_tiny(run_config(), tmp_path / "large", teacher)


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"group_size": 49}, r"Group size\) 49 is longer than a row of model\.layers\.0\.self_attn\.q_proj, .* 48"),
        ({"overrides": {"*.down_proj": {"group_size": 91}}}, r"Group size\) 91 .*down_proj, which has 90"),
        ({"skip": ["*.w1"]}, r"pattern '\*\.w1' matches no layer; names look like 'model\.layers\.0\."),
        ({"overrides": {"mlp": {"format": "w1"}}}, "pattern 'mlp' matches no layer"),
        ({"skip": ["*"]}, r"leaves no layer to binarize"),
    ],
)
def test_settings_that_do_not_fit_the_model_are_refused_before_any_work(
    quant: dict[str, Any], message: str, teacher: Teacher, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        run_tiny(run_config(quant=quant), tmp_path, teacher)
    assert not (tmp_path / "blocks").exists()


def test_a_layer_that_its_block_never_calls_is_refused_by_name_and_can_be_skipped(
    teacher: Teacher, tmp_path: Path
) -> None:
    teacher.model.get_submodule("model.layers.1.mlp").add_module("spare", torch.nn.Linear(48, 48))
    with pytest.raises(ModelError, match=r"never calls .*quant\.skip=\[\"model\.layers\.1\.mlp\.spare\"\]"):
        run_tiny(run_config(), tmp_path, teacher)
    assert not (tmp_path / "blocks").exists()
    events = run_tiny(run_config(quant={"skip": ["model.layers.1.mlp.spare"]}), tmp_path, teacher)
    assert isinstance(events[-1], RunDone)


def test_a_checkpoint_appears_whole_or_not_at_all(
    whole: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    class FullDisk:
        def save_pretrained(self, folder: Path) -> None:
            raise OSError(28, "No space left on device")

    folder = started_again_from(whole[0], tmp_path / "run", STATES)
    full = Teacher(teacher.name, teacher.model, FullDisk(), "float32", "none")  # type: ignore[arg-type]
    with pytest.raises(OSError, match="No space left"):
        run_tiny(run_config(), folder, full)
    assert sorted(path.name for path in folder.iterdir()) == ["blocks", "precision"]
    run_tiny(run_config(), folder, teacher)
    assert hashes(folder / "checkpoint") == hashes(whole[0] / "checkpoint")


def test_the_result_depends_on_the_seed_and_on_nothing_else(
    whole: tuple[Path, list[Event]], teacher: Teacher, tmp_path: Path
) -> None:
    torch.manual_seed(1234)
    run_tiny(run_config(), tmp_path / "same", teacher)
    assert hashes(tmp_path / "same" / "checkpoint") == hashes(whole[0] / "checkpoint")
    other: RunConfig = run_config(seed=1)
    run_tiny(other, tmp_path / "other", teacher)
    assert hashes(tmp_path / "other" / "checkpoint") != hashes(whole[0] / "checkpoint")


def test_a_block_that_is_skipped_whole_stays_dense_through_all_stages(teacher: Teacher, tmp_path: Path) -> None:
    path, blocks = decoder_blocks(teacher.model)
    config = run_config(quant={"skip": (f"{path}.1.*",)})
    events = run_tiny(config, tmp_path, teacher)
    assert isinstance(events[-1], RunDone)
    steps = {event.block for event in events if isinstance(event, StepMetric)}
    assert steps == set(range(len(blocks))) - {1}
    model, _ = load(tmp_path / "checkpoint")
    kept = linear_layers(model.get_submodule(f"{path}.1"))
    assert kept
    for name, layer in linear_layers(blocks[1]).items():
        assert torch.equal(linear_weight(kept[name]), linear_weight(layer).bfloat16().float())


@pytest.mark.parametrize(
    ("after", "alarms"), [(0.5, False), (1.0, False), (1.01, False), (1.1, True), (math.inf, True), (math.nan, True)]
)
def test_a_block_that_training_leaves_about_as_it_was_is_no_divergence(after: float, alarms: bool) -> None:
    assert is_divergence(1.0, after) is alarms
