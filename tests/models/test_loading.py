"""What a model's files hold decides what is loaded: heads of their own, every tensor, files beside them, tokens with a
row, sizes that can be. Anything else is one message, and no code of theirs runs."""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm
from lbllm.chat.stream import stream
from lbllm.checkpoints.dense import dense_copy
from lbllm.checkpoints.hf import is_checkpoint
from lbllm.checkpoints.seal import seal_again
from lbllm.errors import CheckpointError, LbllmError, ModelError
from lbllm.measure.estimate import estimate
from lbllm.models.gguf import convert
from lbllm.models.teacher import load_teacher, skeleton
from lbllm.share.gguf import write_gguf
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, token_ids


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "teacher", "llama")


def logits(model: Any, ids: torch.Tensor | None = None) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=1) if ids is None else ids).logits.float()


def edit(folder: Path, name: str = "config.json", **changes: Any) -> None:
    document = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps(document | changes))


def add_head(folder: Path, scale: float = 0.3) -> torch.Tensor:
    """Give a tied model's files a head of their own, as merged adapters have it; returns it."""
    tensors = load_file(folder / "model.safetensors")
    rows = tensors["model.embed_tokens.weight"]
    head = torch.randn(rows.shape, generator=torch.Generator().manual_seed(5)) * scale
    tensors["lm_head.weight"] = head.bfloat16().float()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return tensors["lm_head.weight"]


@pytest.fixture(scope="module")
def own_head(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A teacher whose config says that it has no head of its own, but whose files have one; and a run of it."""
    folder = tmp_path_factory.mktemp("own_head")
    teacher = save_tiny(folder / "teacher", "llama")
    add_head(teacher)
    small = {"tokens": 64, "batch_tokens": 64}
    config = run_config(stages=["ptq", "e2e"], quant={"act_bits": 16, "kv_bits": 16}, e2e=small | {"lr_weight": 1e-3})
    run_tiny(config, folder / "run", load_teacher(str(teacher)))
    return teacher, folder / "run" / "checkpoint"


def test_a_head_of_its_own_stays_in_all_that_is_written(own_head: tuple[Path, Path], tmp_path: Path) -> None:
    folder, checkpoint = own_head
    with safe_open(folder / "model.safetensors", "pt") as file:
        head = file.get_tensor("lm_head.weight")
    teacher = load_teacher(str(folder)).model
    assert torch.equal(teacher.get_output_embeddings().weight, head)
    assert not teacher.config.tie_word_embeddings
    packed, tokenizer = lbllm.load(checkpoint, dtype=torch.bfloat16)
    assert torch.equal(packed.get_output_embeddings().weight, head.bfloat16())
    assert not json.loads((checkpoint / "config.json").read_text())["tie_word_embeddings"]
    by_transformers = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    by_transformers.save_pretrained(tmp_path / "again")
    again = lbllm.load(tmp_path / "again")[0] if tokenizer.save_pretrained(tmp_path / "again") else None
    assert again is not None
    assert torch.equal(again.get_output_embeddings().weight, head)
    dense = dense_copy(packed)
    dense.save_pretrained(tmp_path / "dense")
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype=torch.float32)
    assert torch.equal(read.lm_head.weight, head)
    write_gguf(dense_copy(packed), tokenizer, tmp_path / "m.gguf", name="m", licence=None)
    back = AutoModelForCausalLM.from_pretrained(convert(tmp_path / "m.gguf", tmp_path / "models"))
    assert torch.equal(back.lm_head.weight, head)
    torch.testing.assert_close(logits(back), logits(read), rtol=1e-4, atol=1e-4)


def test_the_estimate_counts_a_head_of_its_own(own_head: tuple[Path, Path]) -> None:
    folder, checkpoint = own_head
    assert skeleton(str(folder)).num_parameters() == load_teacher(str(folder)).model.num_parameters()
    said = estimate(run_config(model=str(folder), quant={"act_bits": 16, "kv_bits": 16}), rate=1e9)
    assert said.parts["output head"] == 2 * 320 * 48
    assert abs(said.disk_bytes - (checkpoint / "model.safetensors").stat().st_size) <= 16


def test_the_given_model_decides_and_stays_as_it_is(llama: Path, tmp_path: Path) -> None:
    head = add_head(llama)
    model = AutoModelForCausalLM.from_pretrained(llama)
    packed = lbllm.quantize(
        model, AutoTokenizer.from_pretrained(llama), run_config(stages=["ptq"]), sequences=token_ids(), out=tmp_path
    )
    assert torch.equal(packed.get_output_embeddings().weight, head)
    assert model.config.tie_word_embeddings


def test_an_equal_or_missing_head_is_the_embeddings(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    model = load_teacher(str(llama)).model
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert skeleton(str(llama)).num_parameters() == model.num_parameters()
    del tensors["lm_head.weight"]
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    edit(llama, tie_word_embeddings=False)
    with pytest.raises(ModelError, match=r"lm_head\.weight.*tie_word_embeddings: true"):
        load_teacher(str(llama))


def test_a_weight_that_the_model_has_not_is_named(llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    tensors["model.layers.0.self_attn.q_proj.bias"] = torch.zeros(48)
    save_file(tensors, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"does not have, e\.g\. model\.layers\.0\.self_attn\.q_proj\.bias"):
        load_teacher(str(llama))


@pytest.mark.parametrize(
    "name", ["pytorch_model.bin", "../other/model.safetensors", "/etc/passwd", "a/b.safetensors", "gone.safetensors"]
)
def test_an_index_names_files_beside_it_only(name: str, llama: Path) -> None:
    tensors = load_file(llama / "model.safetensors")
    (llama.parent / "other").mkdir()
    (llama / "model.safetensors").rename(llama.parent / "other" / "model.safetensors")
    torch.save(tensors, llama / "pytorch_model.bin")
    save_file(tensors, llama / "model-1.safetensors", metadata={"format": "pt"})
    for index in (
        {"metadata": {}, "weight_map": dict.fromkeys(tensors, name)},
        {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors") | {"x": name}},
    ):
        (llama / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(ModelError, match=r"index\.json names the file"):
            load_teacher(str(llama))
    (llama / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ModelError, match=r"index\.json is not a JSON object"):
        load_teacher(str(llama))
    whole = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "model-1.safetensors")}
    (llama / "model.safetensors.index.json").write_text(json.dumps(whole))
    load_teacher(str(llama))


@pytest.mark.parametrize("stated", ["pytorch_model.bin", "../x.safetensors", 3, "other.safetensors.index.json/"])
def test_a_config_names_weights_beside_it_only(stated: object, llama: Path) -> None:
    edit(llama, transformers_weights=stated)
    with pytest.raises(ModelError, match="names the weights file"):
        load_teacher(str(llama))


def test_a_packed_checkpoint_is_the_file_whose_hash_is_checked(own_head: tuple[Path, Path], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(own_head[1], tmp_path / "packed"))
    shutil.copy(folder / "model.safetensors", folder / "other.safetensors")
    edit(folder, transformers_weights="other.safetensors")
    with pytest.raises(CheckpointError, match="another weights file"):
        lbllm.load(folder)
    shutil.copy(own_head[1] / "config.json", folder)
    (folder / "other.safetensors").rename(tmp_path / "model.safetensors")
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "../model.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match=r"names the file .\.\./model\.safetensors"):
        lbllm.load(folder)


def test_no_code_of_a_model_runs_and_nobody_is_asked(
    own_head: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*_: object) -> str:
        raise AssertionError("nobody must be asked")

    monkeypatch.setattr("builtins.input", asked)
    code = "raise SystemExit('this code must never run')\n"
    classes = {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M", "AutoTokenizer": ["code.T", "code.T"]}
    for source, load in ((own_head[1], lbllm.load), (own_head[0], lambda folder: load_teacher(str(folder)))):
        for changes in ({"auto_map": classes}, {"auto_map": classes, "model_type": "mystery"}):
            folder = Path(shutil.copytree(source, tmp_path / f"{source.name}{len(changes)}"))
            (folder / "code.py").write_text(code)
            (folder / "custom_generate").mkdir()
            (folder / "custom_generate" / "generate.py").write_text(code)
            edit(folder, **changes)
            if is_checkpoint(folder):  # as if whoever made it had sealed it so
                seal_again(folder)
            try:
                load(folder)
            except LbllmError:
                assert len(changes) == 2  # the known architecture loads by transformers' own code
            edit(folder, "tokenizer_config.json", auto_map=classes, tokenizer_class="Mystery")
            if is_checkpoint(folder):
                seal_again(folder)
            with pytest.raises(LbllmError):
                load(folder)
    edit(own_head[0], _attn_implementation="owner/kernel")
    with pytest.raises(ModelError, match=r"'owner/kernel' of another place"):
        load_teacher(str(own_head[0]))


def test_an_added_token_has_a_row_or_is_never_used(llama: Path) -> None:
    tokenizer = load_teacher(str(llama)).tokenizer
    tokenizer.add_tokens(["<|late|>", *(f"<|{number}|>" for number in range(40))])
    number = 319 + 3
    late = next(token for token, at in tokenizer.get_added_vocab().items() if at == number)
    tokenizer.save_pretrained(llama)
    teacher = load_teacher(str(llama))  # no text has it
    with pytest.raises(ModelError, match=rf"{number}.*320 rows"):
        list(stream(teacher.model, teacher.tokenizer, [{"role": "user", "content": late}], max_new_tokens=1))
    tokenizer.chat_template = str(tokenizer.chat_template).replace("<|end|>", late)
    tokenizer.save_pretrained(llama)
    with pytest.raises(ModelError, match=rf"chat template uses the token .*{number}.* 320 rows"):
        load_teacher(str(llama))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_hidden_layers": 10**5},
        {"num_hidden_layers": 10**18},
        {"num_hidden_layers": 0},
        {"vocab_size": 10**9},
        {"vocab_size": "x"},
        {"vocab_size": 10**18},
        {"vocab_size": -1},
        {"num_attention_heads": 0},
        {"num_attention_heads": 10**18},
        {"num_key_value_heads": 3},
        {"hidden_size": 10**18},
        {"hidden_size": None},
        {"hidden_size": []},
        {"hidden_size": 1.5},
        {"intermediate_size": 10**18},
        {"head_dim": 10**18},
        {"max_position_embeddings": 10**18},
        {"max_position_embeddings": "long"},
        {"rms_norm_eps": "x"},
        {"rope_parameters": 3},
        {"hidden_act": "none of these"},
        {"dtype": "none of these"},
        {"model_type": 3},
        {"layer_types": ["x"] * 10},
        {"text_config": {"num_hidden_layers": 10**9}},
    ],
    ids=lambda changes: "-".join(f"{key}-{str(value)[:12]}" for key, value in changes.items()),
)
def test_sizes_that_no_model_has_are_refused_at_once(changes: dict[str, Any], llama: Path) -> None:
    edit(llama, **changes)
    began = time.perf_counter()
    for look in (load_teacher, skeleton, lambda name: estimate(run_config(model=name), rate=1e9)):
        with pytest.raises(LbllmError) as raised:
            look(str(llama))
        assert "\n" not in str(raised.value)
    assert time.perf_counter() - began < 5


@pytest.mark.parametrize("text", ["[]", "3", "null", '"x"', "{", "\x00\xff", "{}", "[" * 5_000, '{"model_type": []}'])
def test_a_config_that_is_none_is_refused(text: str, llama: Path) -> None:
    (llama / "config.json").write_bytes(text.encode("latin-1"))
    for look in (load_teacher, skeleton):
        with pytest.raises(ModelError, match=r"teacher can't be loaded"):
            look(str(llama))
