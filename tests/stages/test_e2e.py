"""Stage 4: its gradient, what it may change, that it learns, and its continuation after an end at any step."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Literal

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from benchmarks.kill_resume import hashes
from lbllm.checkpoints.hf import attach_kv_cache
from lbllm.config import RunConfig, make_config
from lbllm.errors import ConfigError
from lbllm.events import BlockDone, BlockStarted, Event, RunDone, RunStopped, StageStarted, StepMetric
from lbllm.models.blocks import decoder_blocks, share_copy
from lbllm.models.teacher import Teacher
from lbllm.pipeline import end_to_end
from lbllm.pipeline.packed_model import stage_model
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.plan import block_formats
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import Stage
from lbllm.stages.block_state import BlockState, restore
from lbllm.stages.block_store import BlockStore
from lbllm.stages.distill import binary_layers
from lbllm.stages.e2e import EndToEnd
from lbllm.stages.losses import feature_error
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_runs import bfloat_teacher, run_config, run_tiny, token_ids

STAGES: tuple[Stage, ...] = ("ptq", "wat", "aar", "e2e")
STEPS = 6


def config(stages: tuple[Stage, ...] = STAGES, **changes: object) -> RunConfig:
    """A tiny run with stage 4: three sequences, at most two a step, three times."""
    return run_config(stages=stages, e2e={"tokens": 96, "batch_tokens": 64, "epochs": 3} | changes)


@pytest.fixture
def teacher() -> Teacher:
    return bfloat_teacher()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event]]:
    """The folder and the events of an uninterrupted run."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, run_tiny(config(), folder, bfloat_teacher())


def block_state(folder: Path, stage: Stage, block: int) -> dict[str, Tensor]:
    return load_file(folder / "blocks" / f"{stage}-{block:04d}.safetensors")


def e2e_steps(events: list[Event]) -> list[int]:
    return [event.step for event in events if isinstance(event, StepMetric) and event.stage == "e2e"]


def e2e_done(events: list[Event]) -> list[BlockDone]:
    return [event for event in events if isinstance(event, BlockDone) and event.stage == "e2e"]


def trained_student(folder: Path, teacher: Teacher) -> tuple[list[BinaryLinear], PreTrainedModel]:
    """The model after stage 3 of the run in ``folder`` with its layers in training."""
    settings = config()
    student: PreTrainedModel = share_copy(teacher.model)
    attach_kv_cache(student, KVFormat(4), training=True)
    _, student_blocks = decoder_blocks(student)
    _, blocks, formats = block_formats(teacher.model, settings.quant)
    store = BlockStore(folder, None)
    layers: list[BinaryLinear] = []
    for number, block in enumerate(blocks):
        state = store.load("aar", number)
        assert state is not None
        restored = restore(block, formats[number], state.tensors, settings.quant.tail_steps)
        student_blocks[number] = restored
        layers += binary_layers(restored).values()
    return layers, student


@torch.no_grad()
def deployed_loss(settings: RunConfig, folder: Path, stage: Stage, sequences: Tensor) -> float:
    """KL to the teacher's next tokens of the packed model after a stage."""
    teacher = bfloat_teacher()
    student = stage_model(settings, folder, stage, teacher)
    meant, given = (model(input_ids=sequences).logits[:, :-1].log_softmax(-1) for model in (teacher.model, student))
    return float(functional.kl_div(given, meant, log_target=True, reduction="none").sum(-1).mean())


def test_the_whole_model_is_one_block_of_the_events(whole: tuple[Path, list[Event]]) -> None:
    _, events = whole
    at = events.index(StageStarted(stage="e2e", steps=STEPS))
    assert events[at + 1] == BlockStarted(stage="e2e", block=0)
    steps = events[at + 2 : at + 2 + STEPS]
    assert [(s.stage, s.block, s.step) for s in steps if isinstance(s, StepMetric)] == [
        ("e2e", 0, step) for step in range(1, STEPS + 1)
    ]
    done = events[at + 2 + STEPS]
    assert isinstance(done, BlockDone)
    assert isinstance(events[-1], RunDone)


def test_long_sequences_are_cut(tmp_path: Path) -> None:
    """Of each of three sequences of 32 tokens three pieces of 10 are left; four make a step."""
    settings = config(("ptq", "e2e"), seq_len=10, batch_tokens=40)
    events = run_tiny(settings, tmp_path, bfloat_teacher())
    assert StageStarted(stage="e2e", steps=3 * 3) in events
    (done,) = e2e_done(events)
    pieces = token_ids()[-3:, :30].reshape(-1, 10)
    assert done.loss_after == pytest.approx(deployed_loss(settings, tmp_path, "e2e", pieces), rel=2e-2)


@pytest.mark.parametrize("stages", [STAGES, ("ptq", "e2e")])
def test_it_brings_the_deployed_model_closer_and_leaves_the_bits(stages: tuple[Stage, ...], tmp_path: Path) -> None:
    settings = config(stages, epochs=8, lr_levels=5e-3)
    events = run_tiny(settings, tmp_path, bfloat_teacher())
    (done,) = e2e_done(events)
    sequences = token_ids()[-3:]
    before = deployed_loss(settings, tmp_path, stages[-2], sequences)
    after = deployed_loss(settings, tmp_path, "e2e", sequences)
    # What the events say of the model in training holds for the packed one.
    assert done.loss_before == pytest.approx(before, rel=2e-2)
    assert done.loss_after == pytest.approx(after, rel=2e-2)
    assert after < 0.9 * before
    for block in range(2):
        old, new = block_state(tmp_path, stages[-2], block), block_state(tmp_path, "e2e", block)
        for name, tensor in new.items():
            same = torch.equal(tensor, old[name])
            assert same if name.endswith(".index") else not same
        assert ("aar" in stages) == any(name.endswith(".act") for name in new)


@pytest.mark.parametrize("stages", [STAGES, ("ptq", "e2e")])
def test_with_latent_weights_bits_change_too(stages: tuple[Stage, ...], tmp_path: Path) -> None:
    settings = config(stages, epochs=8, lr_levels=5e-3, lr_weight=2e-2)
    events = run_tiny(settings, tmp_path, bfloat_teacher())
    (done,) = e2e_done(events)
    after = deployed_loss(settings, tmp_path, "e2e", token_ids()[-3:])
    assert done.loss_after == pytest.approx(after, rel=2e-2)
    assert after < 0.9 * done.loss_before
    changed = [
        float((tensor != block_state(tmp_path, stages[-2], block)[name]).float().mean())
        for block in range(2)
        for name, tensor in block_state(tmp_path, "e2e", block).items()
        if name.endswith(".index")
    ]
    assert min(changed) > 0
    assert max(changed) < 0.5  # they start from the bits that there are


def test_training_of_latent_weights_goes_on_where_it_was_stopped(
    whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    settings = config(lr_weight=1e-2)
    seen: list[Event] = []
    run_tiny(settings, tmp_path / "whole", bfloat_teacher())
    run_tiny(
        settings, tmp_path, bfloat_teacher(), request=lambda: "stop" if len(e2e_steps(seen)) >= 3 else None, seen=seen
    )
    assert isinstance(seen[-1], RunStopped)
    second = run_tiny(settings, tmp_path, bfloat_teacher())
    assert e2e_steps(second) == [4, 5, 6]
    assert hashes(tmp_path / "checkpoint") == hashes(tmp_path / "whole" / "checkpoint")
    assert hashes(tmp_path / "checkpoint") != hashes(whole[0] / "checkpoint")


@pytest.mark.parametrize("weight", [0.5, 2.0])
def test_features_are_part_of_the_loss(weight: float, whole: tuple[Path, list[Event]], teacher: Teacher) -> None:
    layers, student = trained_student(whole[0], teacher)
    rates = config().e2e
    sequences = token_ids(2)
    plain, both = (
        EndToEnd(student, teacher.model, layers, sequences, settings, seed=0, autocast=nullcontext).loss(sequences)
        for settings in (rates, rates.model_copy(update={"feature_weight": weight}))
    )
    outputs: list[list[Tensor]] = []
    with torch.no_grad():
        for model in (student, teacher.model):
            kept: list[Tensor] = []
            hooks = [
                module.register_forward_hook(lambda _, __, given, kept=kept: kept.append(given))
                for module in (*model.model.layers[:-1], model.model.norm)
            ]
            for sequence in sequences.split(1):
                model(input_ids=sequence[:, :-1])  # the last token tells nothing of a next one
            for hook in hooks:
                hook.remove()
            outputs.append(kept)
    blocks = len(outputs[0]) // 2
    errors = [feature_error(outputs[0][at : at + blocks], outputs[1][at : at + blocks]) for at in (0, blocks)]
    assert both - plain == pytest.approx(weight * float(sum(errors)) / 2, rel=1e-3)


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_a_share_of_the_start_is_in_what_it_ends_with(share: float, whole: tuple[Path, list[Event]]) -> None:
    ends: dict[float, list[Tensor]] = {}
    for part in (0.0, share):
        teacher = bfloat_teacher()
        layers, student = trained_student(whole[0], teacher)
        rates = config().e2e.model_copy(update={"lr_weight": 1e-2, "lr_act": 1e-2, "start_share": part})
        latents = [layer.weight().detach() for layer in layers]
        training = EndToEnd(
            student, teacher.model, layers, token_ids(), rates, latents=latents, seed=0, autocast=nullcontext
        )
        begun = [parameter.detach().clone() for parameter in training.parameters]
        assert len(list(filter(None, training.steps()))) == len(training.order)
        ends[part] = [parameter.detach().clone() for parameter in training.parameters]
    assert len(begun) == 2 * len(layers) + len(training.quantizers)
    for start, trained, mixed in zip(begun, ends[0.0], ends[share], strict=True):
        wanted = share * start.double() + (1 - share) * trained.double()
        assert torch.allclose(mixed.double(), wanted, rtol=1e-5, atol=1e-7)
    assert any(not torch.equal(start, trained) for start, trained in zip(begun, ends[0.0], strict=True))


@pytest.mark.parametrize("end", [2, pytest.param(STEPS, marks=pytest.mark.soak)])
def test_a_share_of_the_start_outlives_an_interruption(
    end: int, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    settings = config(start_share=0.5)
    run_tiny(settings, tmp_path / "at once", bfloat_teacher())
    seen: list[Event] = []
    run_tiny(
        settings,
        tmp_path / "in two",
        bfloat_teacher(),
        request=lambda: "stop" if len(e2e_steps(seen)) >= end else None,
        seen=seen,
    )
    run_tiny(settings, tmp_path / "in two", bfloat_teacher())
    assert hashes(tmp_path / "at once" / "checkpoint") == hashes(tmp_path / "in two" / "checkpoint")
    assert hashes(tmp_path / "at once" / "checkpoint") != hashes(whole[0] / "checkpoint")


@pytest.mark.parametrize("rate", [1e4, float("inf")])
def test_what_diverges_keeps_the_state_before(rate: float, whole: tuple[Path, list[Event]], tmp_path: Path) -> None:
    if rate == float("inf"):
        with pytest.raises(ConfigError, match=r"e2e\.lr_levels"):
            config(lr_levels=rate)
        return
    events = run_tiny(config(lr_levels=rate), tmp_path, bfloat_teacher())
    (done,) = e2e_done(events)
    assert done.diverged
    assert done.loss_after == done.loss_before
    for block in range(2):
        old, new = block_state(tmp_path, "aar", block), block_state(tmp_path, "e2e", block)
        assert old.keys() == new.keys()
        assert all(torch.equal(old[name], new[name]) for name in old)


@pytest.mark.parametrize("end", [0, 3, *(pytest.param(end, marks=pytest.mark.soak) for end in (1, 5))])
def test_stopped_anywhere_and_continued_it_ends_with_the_same_bytes(
    end: int, whole: tuple[Path, list[Event]], tmp_path: Path
) -> None:
    folder, events = whole
    shutil.copytree(folder / "blocks", tmp_path / "blocks", ignore=shutil.ignore_patterns("e2e-*"))
    seen: list[Event] = []

    def request() -> Literal["stop"] | None:
        begun = any(event == BlockStarted(stage="e2e", block=0) for event in seen)
        return "stop" if begun and len(e2e_steps(seen)) >= end else None

    run_tiny(config(), tmp_path, bfloat_teacher(), request=request, seen=seen)
    assert isinstance(seen[-1], RunStopped)
    assert e2e_steps(seen) == list(range(1, end + 1))
    second = run_tiny(config(), tmp_path, bfloat_teacher())
    assert e2e_steps(second) == list(range(end + 1, STEPS + 1))
    assert hashes(tmp_path / "checkpoint") == hashes(folder / "checkpoint")
    assert [done.loss_before for done in e2e_done(second)] == [done.loss_before for done in e2e_done(events)]


def test_killed_between_two_savings_it_repeats_steps_and_ends_the_same(
    whole: tuple[Path, list[Event]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(end_to_end, "SAVE_SECONDS", 0.0)
    saved = 0
    keep = BlockStore.save

    def save_twice(self: BlockStore, stage: Stage, block: int, state: BlockState) -> None:
        nonlocal saved
        if stage == "e2e" and block == 2:
            saved += 1
            if saved > 2:
                raise KeyboardInterrupt
        keep(self, stage, block, state)

    monkeypatch.setattr(BlockStore, "save", save_twice)
    with pytest.raises(KeyboardInterrupt):
        run_tiny(config(), tmp_path, bfloat_teacher())
    monkeypatch.setattr(BlockStore, "save", keep)
    second = run_tiny(config(), tmp_path, bfloat_teacher())
    assert e2e_steps(second) == [3, 4, 5, 6]
    assert not any(isinstance(event, BlockStarted) for event in second)
    assert hashes(tmp_path / "checkpoint") == hashes(whole[0] / "checkpoint")


def test_a_model_with_state_of_another_kind_than_attention_is_trained(tmp_path: Path) -> None:
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model(
        "lfm2", vocab_size=320, num_hidden_layers=2, layer_types=["conv", "full_attention"], **sizes
    )
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    hybrid = Teacher("tiny", model, tiny_tokenizer(), "float32", "none")
    quant = {"kv_bits": 16, "act_bits": 16}
    once = {"tokens": 32, "batch_tokens": 32, "epochs": 1}
    events = run_tiny(run_config(stages=["ptq", "e2e"], quant=quant, e2e=once), tmp_path, hybrid)
    assert isinstance(events[-1], RunDone)


def test_the_gradient_is_that_of_the_whole_graph(whole: tuple[Path, list[Event]], teacher: Teacher) -> None:
    """Weights expanded once, sequences one by one: the same gradient as of one pass through everything."""

    layers, student = trained_student(whole[0], teacher)
    sequences = token_ids(2)
    rates = config().e2e.model_copy(
        update={"batch_tokens": 64, "epochs": 1, "lr_levels": 0.0, "lr_act": 0.0, "grad_clip": 1e9}
    )
    training = EndToEnd(student, teacher.model, layers, sequences, rates, seed=0, autocast=nullcontext)
    list(training.steps())
    found = [parameter.grad.clone() for parameter in training.parameters if parameter.grad is not None]
    for parameter in training.parameters:
        parameter.grad = None
    meant = teacher.model(input_ids=sequences).logits[:, :-1].log_softmax(-1)
    given = student(input_ids=sequences).logits[:, :-1].log_softmax(-1)
    functional.kl_div(given, meant, log_target=True, reduction="none").sum(-1).mean().backward()
    assert len(found) == len(training.parameters)
    for parameter, gradient in zip(training.parameters, found, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-5 * float(parameter.grad.abs().max()))


@pytest.mark.parametrize("stages", [["wat", "e2e"], ["ptq", "e2e", "wat"], ["ptq", "aar", "e2e"]])
def test_it_comes_last_and_others_in_order(stages: list[str]) -> None:
    with pytest.raises(ConfigError, match="e2e may follow any"):
        make_config("quick", {"stages": stages})
