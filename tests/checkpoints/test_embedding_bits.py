"""Checkpoints whose embeddings and output head have 8, 6 or 4 bits: made by a run, by repack, loaded, exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import lbllm
from lbllm.chat.pool import load_model
from lbllm.checkpoints import shipped
from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.record import read_record
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.commands.main import main
from lbllm.config import RunConfig
from lbllm.errors import ConfigError, ModelError
from lbllm.measure.estimate import estimate
from lbllm.measure.perplexity import block_perplexity, perplexity
from lbllm.microscope.microscope import Microscope
from lbllm.microscope.pair import Pair
from lbllm.models.source import embedded_file
from lbllm.models.streamed import BlockModel
from lbllm.models.teacher import load_teacher, stream_teacher
from lbllm.pipeline.packed_model import stage_blocks, stage_model
from lbllm.pipeline.start import settings_to_go_on
from lbllm.quant.embedding_code import PackedRows, group_scales, pack_matrix, round_matrix, with_group_scales
from lbllm.quant.packed_embedding import PackedEmbedding, PackedHead, PackedTable, tables
from lbllm.sections import EmbeddingBits
from lbllm.share.export import export
from lbllm.share.repack import repack
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, token_ids

BITS = get_args(EmbeddingBits)
PACKED = tuple(bits for bits in BITS if bits < 16)


def made(folder: Path, bits: int, **changes: Any) -> Path:
    """A checkpoint of a short run, in ``folder``/run, from the teacher in ``folder``/teacher."""
    teacher = folder / "teacher"
    config = run_config(model=str(teacher), quant={"embedding_bits": bits}, stages=["ptq"], **changes)
    run_tiny(config, folder / "run", load_teacher(str(teacher)))
    return folder / "run/checkpoint"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """A checkpoint of the same run for each number of bits."""
    found = {}
    for bits in BITS:
        folder = tmp_path_factory.mktemp(f"bits{bits}")
        save_tiny(folder / "teacher", "llama")
        found[bits] = made(folder, bits)
    return found


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=1)).logits


def teacher_rows(checkpoint: Path) -> Tensor:
    weight: Tensor = load_teacher(str(checkpoint.parent.parent / "teacher")).model.get_parameter(
        "model.embed_tokens.weight"
    )
    return weight.detach()


def packed_matrix(rows: Tensor, bits: EmbeddingBits) -> PackedRows:
    return pack_matrix(rows.__getitem__, tuple(rows.shape), bits)


@pytest.mark.parametrize("bits", PACKED)
def test_a_run_packs_the_teachers_own_weights_and_nothing_else_changes(
    checkpoints: dict[int, Path], bits: EmbeddingBits
) -> None:
    before, after = (load_file(checkpoints[one] / WEIGHTS) for one in (16, bits))
    packed, scale = packed_matrix(teacher_rows(checkpoints[bits]), bits)
    assert torch.equal(after.pop("model.embed_tokens.weight"), packed)
    for name in ("model.embed_tokens", "lm_head"):
        if scale is not None:
            assert torch.equal(after.pop(f"{name}.column_scale").view(torch.float16)[:, 0], scale)
    del before["model.embed_tokens.weight"]
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("bits", PACKED)
def test_a_loaded_model_computes_from_packed_rows(
    checkpoints: dict[int, Path], bits: EmbeddingBits, tmp_path: Path
) -> None:
    model: Any = lbllm.load(checkpoints[bits])[0]
    head, embedding = model.lm_head, model.model.embed_tokens
    assert isinstance(head, PackedHead)
    assert isinstance(embedding, PackedEmbedding)
    assert head.weight is embedding.weight
    rounded: Any = lbllm.load(checkpoints[16])[0]
    for name in ("lm_head", "model.embed_tokens"):
        module = torch.nn.Linear(48, 320, bias=False) if name == "lm_head" else torch.nn.Embedding(320, 48)
        module.weight.data = round_matrix(teacher_rows(checkpoints[bits]), bits)
        rounded.set_submodule(name, module)
    torch.testing.assert_close(logits(model), logits(rounded), rtol=1e-3, atol=1e-3)
    ids = token_ids(1, seed=3)[:, :8]
    answer = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(answer, rounded.generate(ids, max_new_tokens=5, do_sample=False))
    # Saved again, in several files, and loaded by transformers.
    model.save_pretrained(tmp_path / "again", max_shard_size="20KB")
    assert len(list((tmp_path / "again").glob("model-*.safetensors"))) > 1
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(logits(again), logits(model))
    assert again.lm_head.weight is again.model.embed_tokens.weight


@pytest.mark.parametrize("bits", [8, 6])
def test_perplexity_block_by_block_is_that_of_the_checkpoint(checkpoints: dict[int, Path], bits: int) -> None:
    """The teacher is read from its files by rows, or is in memory."""
    checkpoint = checkpoints[bits]
    config = read_record(checkpoint).settings
    assert config is not None
    expected = perplexity(lbllm.load(checkpoint)[0], token_ids(3, seed=2)).perplexity
    for teacher in (
        stream_teacher(config.model, torch.device("cpu")).model,
        BlockModel.of(load_teacher(config.model).model),
    ):
        made = stage_blocks(config, checkpoint.parent, "ptq", teacher)
        assert block_perplexity(made, token_ids(3, seed=2)) == pytest.approx(expected, rel=1e-3)


def test_an_untied_head_gets_the_same_bits(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", "llama_bias")
    checkpoint = made(tmp_path, 6)
    teacher = load_teacher(str(tmp_path / "teacher")).model
    model = lbllm.load(checkpoint)[0]
    for name, table in tables(model).items():
        assert isinstance(table, PackedTable)
        weight = teacher.get_parameter(f"{name}.weight").detach()
        assert torch.equal(table.expanded(torch.float32), round_matrix(weight, 6))
    assert len({id(table.weight) for table in tables(model).values()}) == 2


@pytest.mark.parametrize("architecture", ["llama", "llama_bias"])
@pytest.mark.parametrize("bits", PACKED)
def test_the_estimate_is_the_size_of_the_file(tmp_path: Path, architecture: str, bits: int) -> None:
    save_tiny(tmp_path / "teacher", architecture)
    config = run_config(model=str(tmp_path / "teacher"), quant={"embedding_bits": bits}, stages=["ptq"])
    result = estimate(config, rate=1e9)
    assert result.disk_bytes == (made(tmp_path, bits) / WEIGHTS).stat().st_size


@pytest.mark.parametrize("bits", PACKED)
def test_repack_gives_the_checkpoint_of_a_run_with_these_bits(
    checkpoints: dict[int, Path], bits: EmbeddingBits, tmp_path: Path
) -> None:
    teacher = str(checkpoints[16].parent.parent / "teacher")
    done = repack(find_checkpoint(str(checkpoints[16])), bits, tmp_path / "out", teacher=teacher)
    assert done.disk_bytes == (checkpoints[bits] / WEIGHTS).stat().st_size
    expected, found = (load_file(folder / WEIGHTS) for folder in (checkpoints[bits], done.path))
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert torch.equal(logits(lbllm.load(done.path)[0]), logits(lbllm.load(checkpoints[bits])[0]))
    assert {one.what for one in read_record(done.path).evaluations} <= {"teacher"}
    # And back.
    back = repack(find_checkpoint(str(done.path)), 16, tmp_path / "back", teacher=teacher).path
    before, after = (load_file(folder / WEIGHTS) for folder in (checkpoints[16], back))
    assert all(torch.equal(before[name], after[name]) for name in before)
    lbllm.load(back)


def test_repack_refuses_another_teacher_and_takes_its_own_weights(
    checkpoints: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = save_tiny(tmp_path / "other", "llama", seed=1)
    words = ["repack", str(checkpoints[16]), "--embedding-bits", "8", "--out", str(tmp_path / "out")]
    assert main([*words, "--teacher", str(other)]) == 1
    assert "embed_tokens is not that of" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main([*words, "--own", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["embedding_bits"] == 8
    stored = load_file(checkpoints[16] / WEIGHTS)["model.embed_tokens.weight"].float()
    assert torch.equal(
        load_file(tmp_path / "out" / WEIGHTS)["model.embed_tokens.weight"], packed_matrix(stored, 8).weight
    )
    words[3] = "5"
    assert main([*words[:-1], str(tmp_path / "five")]) == 1
    assert "choose one of 4, 6, 8 or 16" in capsys.readouterr().err


@pytest.mark.parametrize("bits", PACKED)
def test_the_shipped_checkpoint_can_have_these_bits(checkpoints: dict[int, Path], bits: int, tmp_path: Path) -> None:
    checkpoint = checkpoints[bits]
    shipped.strip(checkpoint, tmp_path / "stripped")
    kept = load_file(tmp_path / "stripped" / shipped.PACKED)
    assert ("model.embed_tokens.weight" in kept) == (bits < 8)  # of 8 bits they are the teacher's
    shipped.assemble(tmp_path / "stripped", load_teacher(str(checkpoint.parent.parent / "teacher")), tmp_path / "whole")
    assert (tmp_path / "whole" / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()


@pytest.mark.parametrize("bits", [8, 4])
def test_a_run_goes_on_from_packed_embeddings_and_can_change_their_bits(
    checkpoints: dict[int, Path], bits: int, tmp_path: Path
) -> None:
    checkpoint = checkpoints[bits]
    teacher = str(checkpoint.parent.parent / "teacher")
    small = {"tokens": 64, "epochs": 1, "batch_tokens": 64, "seq_len": 32, "lr_embeddings": 0}
    changes: dict[str, Any] = {"model": teacher, "start": str(checkpoint), "stages": ["e2e"], "e2e": small}
    quant = {"act_bits": 16, "kv_bits": 16, "embedding_bits": 6}
    run_tiny(run_config(**changes, quant=quant), tmp_path / "run", load_teacher(teacher))
    packed = load_file(tmp_path / "run/checkpoint" / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(packed, packed_matrix(teacher_rows(checkpoint), 6).weight)
    other = str(save_tiny(tmp_path / "other", "llama", seed=1))
    with pytest.raises(ConfigError, match=r"was not made from .*embed_tokens\.weight differs"):
        run_tiny(run_config(**changes | {"model": other}, quant=quant), tmp_path / "bad", load_teacher(other))


@pytest.mark.parametrize("bits", [8, 4])
def test_inspect_opens_it_beside_its_teacher_alone(checkpoints: dict[int, Path], bits: int, tmp_path: Path) -> None:
    checkpoint = checkpoints[bits]
    teacher = str(checkpoint.parent.parent / "teacher")
    Microscope.open(str(checkpoint), teacher)
    loaded = [load_model(name) for name in (teacher, str(checkpoint))]
    assert Pair(*loaded).blocks == 2
    assert loaded[1].precision.endswith(f", embeddings in {bits} bits")
    assert loaded[1].weights == loaded[0].weights
    other = str(save_tiny(tmp_path / "other", "llama", seed=1))
    with pytest.raises(ModelError, match=r"embed_tokens\.weight differs"):
        Microscope.open(str(checkpoint), other)


def test_a_teacher_of_q8_0_keeps_its_embeddings_to_the_last_bit(tmp_path: Path) -> None:
    """Also on the real file: what was read from it is float32, and was not rounded to bfloat16 on the way."""
    from gguf import GGUFReader

    file = tmp_path / "tiny.gguf"
    write_gguf(file)
    for place in (file, embedded_file()):
        teacher = stream_teacher(str(place), torch.device("cpu")).model.rows("model.embed_tokens.weight", slice(0, 300))
        (blocks,) = (tensor.data for tensor in GGUFReader(place).tensors if tensor.name == "token_embd.weight")
        packed = packed_matrix(teacher, 8).weight
        assert torch.equal(packed, torch.from_numpy(blocks[:300].copy()))
        assert torch.equal(round_matrix(teacher, 8), teacher)
        assert not torch.equal(teacher.bfloat16().float(), teacher)


def test_exports_have_the_packed_values(tmp_path: Path) -> None:
    from gguf import GGUFReader

    write_gguf(tmp_path / "teacher.gguf")
    config = run_config(model=str(tmp_path / "teacher.gguf"), quant={"embedding_bits": 8}, stages=["ptq"])
    run_tiny(config, tmp_path / "run", load_teacher(str(tmp_path / "teacher.gguf")))
    source = find_checkpoint(str(tmp_path / "run/checkpoint"))
    model: Any = lbllm.load(source.folder)[0]
    dense = export(source, "dense", tmp_path / "dense").path
    expected = model.lm_head.expanded(torch.bfloat16)
    assert torch.equal(load_file(dense / WEIGHTS)["model.embed_tokens.weight"], expected)
    (written,) = export(source, "gguf", tmp_path / "gguf").path.glob("*.gguf")
    (first,) = (one for one in GGUFReader(tmp_path / "teacher.gguf").tensors if one.name == "token_embd.weight")
    (second,) = (one for one in GGUFReader(written).tensors if one.name == "token_embd.weight")
    assert first.tensor_type == second.tensor_type
    assert (first.data == second.data).all()
    for folder, said in ((dense, "8 bits each"), (written.parent, "8.5, as packed (Q8_0)")):
        assert said in (folder / "README.md").read_text()


def trained(folder: Path, teacher: Path, bits: int, **changes: Any) -> tuple[RunConfig, Path]:
    """A run of stages 1 and 4: its settings and its folder."""
    e2e = {"tokens": 96, "batch_tokens": 64, "epochs": 6, "lr_embeddings": 0.01} | changes
    quant = {"embedding_bits": bits, "act_bits": 16, "kv_bits": 16}
    config = run_config(model=str(teacher), quant=quant, stages=["ptq", "e2e"], e2e=e2e)
    run_tiny(config, folder, load_teacher(str(teacher)))
    return config, folder


@pytest.mark.parametrize(("architecture", "bits"), [("llama", 4), ("llama_bias", 4)])
def test_stage_4_trains_the_scales_of_embeddings_with_few_bits(
    architecture: str, bits: EmbeddingBits, tmp_path: Path
) -> None:
    save_tiny(tmp_path / "teacher", architecture)
    still = trained(tmp_path / "still", tmp_path / "teacher", bits, lr_embeddings=0, lr_levels=0)
    moved = trained(tmp_path / "moved", tmp_path / "teacher", bits, lr_levels=0)
    before, after = (load_file(folder / "checkpoint" / WEIGHTS) for _, folder in (still, moved))
    names = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    tied = architecture == "llama"
    assert names == {"model.embed_tokens.weight"} | (set() if tied else {"lm_head.weight"})
    for name in names:
        scales, own = group_scales(after[name], bits), group_scales(before[name], bits)
        assert torch.equal(with_group_scales(after[name], bits, own), before[name])
        ratio = scales[own != 0] / own[own != 0]
        assert 0.84 < ratio.min() < 0.999
        assert 1.001 < ratio.max() < 1.16
    # They learn, and what the run measured is the model that a checkpoint gives.
    teacher = load_teacher(str(tmp_path / "teacher"))
    with torch.no_grad():
        wanted = torch.log_softmax(teacher.model(token_ids()[-3:]).logits, -1)
        errors = []
        for config, folder in (still, moved):
            made = stage_model(config, folder, "e2e", load_teacher(str(tmp_path / "teacher")))
            found = lbllm.load(folder / "checkpoint", dtype=torch.float32)[0]
            torch.testing.assert_close(logits(found), logits(made), rtol=1e-4, atol=1e-4)
            given = torch.log_softmax(found(token_ids()[-3:]).logits, -1)
            errors.append(float((wanted.exp() * (wanted - given)).sum(-1).mean()))
    assert errors[1] < errors[0]


def test_a_run_from_a_checkpoint_keeps_its_trained_embeddings(tmp_path: Path) -> None:
    save_tiny(tmp_path / "teacher", "llama")
    first = trained(tmp_path / "first", tmp_path / "teacher", 4)[1] / "checkpoint"
    document = settings_to_go_on(str(first))
    rates = {"lr_embeddings": 0, "lr_levels": 0}
    config = run_config(**document, e2e={"tokens": 96, "batch_tokens": 64} | rates)
    run_tiny(config, tmp_path / "second", load_teacher(str(tmp_path / "teacher")))
    before, after = (load_file(tmp_path / run / "checkpoint" / WEIGHTS) for run in ("first", "second"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    # With other bits they are made of the teacher's weights.
    document["quant"]["embedding_bits"] = 6
    other = run_config(**document, e2e={"tokens": 96, "batch_tokens": 64} | rates)
    run_tiny(other, tmp_path / "third", load_teacher(str(tmp_path / "teacher")))
    found = load_file(tmp_path / "third/checkpoint" / WEIGHTS)["model.embed_tokens.weight"]
    assert torch.equal(found, packed_matrix(teacher_rows(tmp_path / "third/checkpoint"), 6).weight)
    # Inspect and Compare know it as one of this teacher.
    Microscope.open(str(first), str(tmp_path / "teacher"))
