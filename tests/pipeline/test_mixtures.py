"""Whole runs of a mixture of experts: the same from files as from memory, an expert without tokens, resuming."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import lbllm
from benchmarks.architectures import tiny_of
from lbllm.checkpoints.dense import dense_copy
from lbllm.errors import ConfigError
from lbllm.events import BlockDone, Event, ExpertDone
from lbllm.models.experts import expert_count
from lbllm.models.streamed import BlockModel
from lbllm.models.teacher import Teacher, load_teacher
from lbllm.pipeline import run as pipeline
from lbllm.pipeline.packed_model import stage_model
from lbllm.quant.packed_layer import PackedLinear
from lbllm.stages.block_store import BlockStore
from lbllm.texts.corpus import Corpus, sequences_hash
from tests.helpers.tiny_models import save_tiny, tiny_tokenizer
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

STAGES: tuple[Any, ...] = ("ptq", "wat", "aar")


def states(folder: Path, blocks: int = 2, experts: int = 4) -> dict[tuple[str, int], dict[str, Tensor]]:
    store = BlockStore(folder, None)
    return {(stage, number): store.whole(stage, number, experts) for stage in STAGES for number in range(blocks)}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Event], Any]:
    folder = tmp_path_factory.mktemp("mixture")
    config = run_config(model=str(save_tiny(folder / "teacher", "qwen3_moe")), stages=list(STAGES))
    return folder, run_tiny(config, folder / "run", tiny_teacher("qwen3_moe")), config


def test_a_run_from_files_gives_the_same_bytes(finished: tuple[Path, list[Event], Any], tmp_path: Path) -> None:
    folder, _, config = finished
    (tmp_path / "precision").write_text("no")
    sequences = token_ids()
    corpus = Corpus("given", sequences_hash(sequences), sequences)
    for _ in pipeline.run(config, tmp_path, request=lambda: None, corpus=corpus):
        pass
    ours, theirs = states(tmp_path), states(folder / "run")
    assert all(equal(ours[place], theirs[place]) for place in theirs)
    name = Path("checkpoint/model.safetensors")
    assert (tmp_path / name).read_bytes() == (folder / "run" / name).read_bytes()


def test_events_say_what_each_expert_saw(finished: tuple[Path, list[Event], Any]) -> None:
    events = finished[1]
    for stage in STAGES:
        for number in range(2):
            done = [e for e in events if isinstance(e, ExpertDone) and (e.stage, e.block) == (stage, number)]
            assert [event.expert for event in done] == [f"mlp.experts.{k}" for k in range(4)]
            assert sum(event.tokens for event in done) == 2 * 128  # two experts for each token
            if stage != "ptq":
                assert all(event.loss_after <= event.loss_before for event in done)
                assert any(event.loss_after < event.loss_before for event in done)
    assert all(
        event.loss_after <= event.loss_before
        for event in events
        if isinstance(event, BlockDone)
        if event.stage != "ptq"
    )


def test_the_packed_mixture_and_its_dense_copy_compute_what_the_run_did(
    finished: tuple[Path, list[Event], Any],
) -> None:
    folder, _, config = finished
    model, ids = lbllm.load(folder / "run" / "checkpoint")[0], token_ids(1, seed=5)
    assert sum(isinstance(module, PackedLinear) for module in model.modules()) == 2 * (4 + 3 * 4)
    staged = stage_model(config, folder / "run", "aar", tiny_teacher("qwen3_moe"))
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, staged(ids).logits, rtol=0, atol=1e-3)
        dense = dense_copy(model)
        dense.save_pretrained(folder / "dense")
    tiny_tokenizer().save_pretrained(folder / "dense")
    copied = load_teacher(str(folder / "dense")).model
    for name, layer in model.named_modules():
        if isinstance(layer, PackedLinear):
            weight: Any = copied.get_submodule(name).weight
            assert torch.equal(weight, layer.dequantize().bfloat16().float()), name


def test_a_run_that_is_stopped_within_a_block_ends_the_same(
    finished: tuple[Path, list[Event], Any], tmp_path: Path
) -> None:
    folder, _, config = finished
    seen: list[Event] = []

    def stop() -> Any:
        inside = [e for e in seen if isinstance(e, ExpertDone) and e.stage == "wat"]
        return "stop" if len(inside) == 6 else None

    run_tiny(config, tmp_path, tiny_teacher("qwen3_moe"), request=stop, seen=seen)
    assert not (tmp_path / "checkpoint").exists()
    run_tiny(config, tmp_path, tiny_teacher("qwen3_moe"))
    ours, theirs = states(tmp_path), states(folder / "run")
    assert all(equal(ours[place], theirs[place]) for place in theirs)


def test_an_expert_without_tokens_is_binarized_on_all_tokens_of_the_layer(tmp_path: Path) -> None:
    model = tiny_of("deepseek_v3")
    router: Any = model.get_submodule("model.layers.1.mlp.gate")
    router.e_score_correction_bias[3] = -1e9  # never chosen
    teacher = Teacher("tiny", model.requires_grad_(False), tiny_tokenizer(chat=False), "float32", "none")
    config = run_config(stages=[*STAGES, "e2e"], e2e={"tokens": 64, "lr_weight": 0.01})
    events = run_tiny(config, tmp_path, teacher)
    done = [event for event in events if isinstance(event, ExpertDone) and event.expert == "mlp.experts.3"]
    assert [(event.stage, event.tokens) for event in done] == [(stage, 0) for stage in STAGES]
    assert 0 < done[0].loss_before < done[0].loss_after < 1
    assert expert_count(BlockModel.of(model).blocks[1]) == 4
    loaded: Any = lbllm.load(tmp_path / "checkpoint")[0]
    layer = loaded.get_submodule("model.layers.1.mlp.experts.3.down_proj")
    assert isinstance(layer, PackedLinear)
    with torch.no_grad():
        assert loaded(token_ids(1)).logits.isfinite().all()
        dense: Any = model.get_submodule("model.layers.1.mlp.experts.3.down_proj")
        assert (layer.dequantize() - dense.weight).norm() < 0.6 * dense.weight.norm()


def test_both_streams_are_refused_where_experts_would_not_train_on_them(tmp_path: Path) -> None:
    config = run_config(stages=["ptq", "wat"], wat={"streams": "both"})
    with pytest.raises(ConfigError, match=r'set .*streams.* to "student"'):
        run_tiny(config, tmp_path, tiny_teacher("qwen3_moe"))
