"""Teachers load from folders, GGUF files and the embedded package; what can't be a teacher is refused by name."""

from __future__ import annotations

import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from lbllm.errors import ModelError
from lbllm.models.catalogue import MODELS
from lbllm.models.teacher import load_teacher, load_tokenizer, skeleton, summary
from lbllm.places import home
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import DENSE_ARCHITECTURES, save_tiny, tiny, tiny_tokenizer

EMBEDDED = "smollm2-135m-instruct"


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return save_tiny(tmp_path / "teacher", "llama")


@pytest.fixture
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def test_catalogue_names_are_unique_and_begin_with_the_embedded_model() -> None:
    ids = [entry.id for entry in MODELS]
    assert ids[0] == EMBEDDED
    assert MODELS[0].hub_id is None
    assert len(set(ids)) == len(ids)
    assert all(name == name.lower() for name in ids)
    assert all(entry.hub_id and re.fullmatch(r"[\w-]+/[\w.-]+", entry.hub_id) for entry in MODELS[1:])
    assert all(entry.licence and entry.parameters > 1e8 for entry in MODELS)


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_folder_gives_the_same_model(architecture: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tmp_path, architecture)
    capfd.readouterr()
    teacher = load_teacher(str(folder))
    assert capfd.readouterr() == ("", "")
    original, tokenizer = tiny(architecture)
    ids = torch.tensor([tokenizer.encode("The river runs past the old mill.")])
    assert torch.equal(teacher.model(ids).logits, original(ids).logits)
    assert teacher.tokenizer.encode("The old mill") == tokenizer.encode("The old mill")
    assert not teacher.model.training
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())
    assert teacher.precision == "float32"


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_skeleton_has_the_shapes_without_the_weights(architecture: str, tmp_path: Path) -> None:
    bare = skeleton(str(save_tiny(tmp_path, architecture)))
    original, _ = tiny(architecture)
    assert {name: value.shape for name, value in bare.state_dict().items()} == {
        name: value.shape for name, value in original.state_dict().items()
    }
    assert all(parameter.is_meta for parameter in bare.parameters())
    assert bare.num_parameters() == original.num_parameters()


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_summary_counts_every_parameter_once(architecture: str, tmp_path: Path) -> None:
    facts = summary(str(save_tiny(tmp_path, architecture)))
    model, tokenizer = tiny(architecture)
    assert facts.architecture == type(model).__name__
    assert facts.parameters == model.num_parameters() == facts.binarized + sum(facts.kept.values())
    assert facts.chat_template == (tokenizer.chat_template is not None)
    assert facts.context_length == 256
    assert ("output head" in facts.kept) == (not model.config.tie_word_embeddings)


def test_dtype_and_precision(llama: Path) -> None:
    config = json.loads((llama / "config.json").read_text())
    (llama / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    (llama / "README.md").write_text("---\nlicense: mit\n---\n# A model\n")
    teacher = load_teacher(str(llama), dtype=torch.bfloat16)
    assert teacher.model.dtype == torch.bfloat16
    assert teacher.precision == "bfloat16"
    assert teacher.licence == "mit"


def test_unknown_name_lists_close_ones() -> None:
    with pytest.raises(ModelError, match=r"'smolm2-360m' is not known; close names: smollm2-360m"):
        load_teacher("smolm2-360m")


def test_missing_places_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no/such/folder does not exist"):
        load_teacher("no/such/folder")
    with pytest.raises(ModelError, match=r"lost\.gguf does not exist"):
        load_teacher("lost.gguf")
    with pytest.raises(ModelError, match=r"has no config\.json"):
        load_teacher(str(tmp_path))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ModelError, match="is a file; give a model's folder"):
        load_teacher(str(tmp_path / "model.safetensors"))


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_the_way_out_is_said() -> None:
    for name in ("qwen3-0.6b", "Qwen/Qwen3-0.6B"):
        with pytest.raises(ModelError, match=r"Qwen/Qwen3-0\.6B can't be downloaded.*hf download.*give the folder"):
            load_teacher(name)


def test_pickled_weights_are_refused(llama: Path) -> None:
    torch.save(load_file(llama / "model.safetensors"), llama / "pytorch_model.bin")
    (llama / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        load_teacher(str(llama))
    (llama / "pytorch_model.bin").unlink()
    with pytest.raises(ModelError, match="contains no weights"):
        load_teacher(str(llama))


def _edit_config(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, r"already quantized \(gptq\)"),
        ({"model_type": "t5", "is_encoder_decoder": True}, "not a decoder-only language model"),
        ({"model_type": "vit"}, "not a decoder-only language model"),
        ({"model_type": "mystery"}, "can't be loaded"),
        (
            {"model_type": "mystery", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}},
            "custom code, which never runs",
        ),
    ],
)
def test_unfit_configs_are_refused(llama: Path, changes: dict[str, Any], message: str) -> None:
    (llama / "code.py").write_text("raise SystemExit('this code must never run')\n")
    _edit_config(llama, **changes)
    for load in (load_teacher, skeleton):
        with pytest.raises(ModelError, match=message):
            load(str(llama))


def test_weights_of_another_shape_are_named(llama: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = load_file(llama / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"] = weights["model.layers.1.mlp.up_proj.weight"][:40].contiguous()
    save_file(weights, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight has shape .*requires .*another copy"):
        load_teacher(str(llama))
    assert capfd.readouterr() == ("", "")


def test_a_tokenizer_of_another_model_is_refused(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama", vocab_size=100)
    with pytest.raises(ModelError, match=r"tokenizer has \d+ tokens, but its embeddings have 100.*of the same model"):
        load_teacher(str(folder))


def test_damaged_folders_are_refused(llama: Path) -> None:
    weights = load_file(llama / "model.safetensors")
    missing = {name: value for name, value in weights.items() if "layers.1.mlp" not in name}
    save_file(missing, llama / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ModelError, match=r"3 weights are missing.*layers\.1\.mlp"):
        load_teacher(str(llama))
    (llama / "model.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0not a header")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_teacher(str(llama))
    (llama / "config.json").write_text("{")
    with pytest.raises(ModelError, match="can't be loaded"):
        load_teacher(str(llama))


def test_folder_without_tokenizer_is_refused(llama: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llama / name).unlink()
    with pytest.raises(ModelError, match="tokenizer"):
        load_teacher(str(llama))


def test_gguf_is_converted_once(tmp_path: Path, own_home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.Q8_0.gguf"
    model = write_gguf(file)
    bare = skeleton(str(file))
    assert not own_home.exists()
    assert bare.num_parameters() == model.num_parameters()
    capfd.readouterr()
    teacher = load_teacher(str(file))
    assert capfd.readouterr() == ("", "")
    ids = torch.tensor([teacher.tokenizer.encode("The river runs past the old mill.")])
    torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits)
    assert ids[0].tolist() == tiny_tokenizer().encode("The river runs past the old mill.")
    assert teacher.precision == "dequantized Q8_0 (tiny.Q8_0.gguf)"
    assert teacher.licence == "mit"

    (folder,) = [path for path in (own_home / "models").iterdir() if path.is_dir()]
    written = (folder / "model.safetensors").stat().st_mtime_ns
    load_teacher(str(file))
    assert skeleton(str(file)).num_parameters() == model.num_parameters()
    assert (folder / "model.safetensors").stat().st_mtime_ns == written

    write_gguf(file, seed=1)
    load_teacher(str(file))
    assert len([path for path in (own_home / "models").iterdir() if path.is_dir()]) == 2


def test_concurrent_conversions_and_leftovers(tmp_path: Path, own_home: Path) -> None:
    file = tmp_path / "tiny.gguf"
    model = write_gguf(file)
    load_teacher(str(file))
    (folder,) = [path for path in (own_home / "models").iterdir() if path.is_dir()]
    # What a converter killed half-way leaves behind.
    half = folder.with_name(f".{folder.name}.01234567.new")
    half.mkdir()
    folder.rename(half / folder.name)
    (half / folder.name / "model.safetensors").write_bytes(b"half")
    with ThreadPoolExecutor(3) as pool:
        teachers = list(pool.map(load_teacher, [str(file)] * 3))
    ids = torch.tensor([[5, 6, 7]])
    for teacher in teachers:
        torch.testing.assert_close(teacher.model(ids).logits, model(ids).logits)
    assert not half.exists()


def test_threads_loading_at_once_leave_models_tied(llama: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        teachers = list(pool.map(load_teacher, [str(llama)] * 12))
        bare = list(pool.map(skeleton, [str(llama)] * 4))
    for model in (*(teacher.model for teacher in teachers), *bare, load_teacher(str(llama)).model):
        assert model.get_output_embeddings().weight is model.get_input_embeddings().weight


def test_the_tests_own_models_are_the_same_while_a_thread_loads(llama: Path) -> None:
    wanted = tiny("llama")[0].state_dict()
    with ThreadPoolExecutor(1) as pool:
        loading = [pool.submit(load_teacher, str(llama)) for _ in range(40)]
        for _ in range(20):
            torch.testing.assert_close(tiny("llama")[0].state_dict(), wanted, rtol=0, atol=0)
        for one in loading:
            one.result()


@pytest.mark.usefixtures("own_home")
def test_bad_gguf_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "bad.gguf"
    file.write_bytes(b"this is no model")
    with pytest.raises(ModelError, match=r"bad\.gguf can't be read as a GGUF file"):
        load_teacher(str(file))
    write_gguf(file)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(ModelError, match=r"bad\.gguf"):
        load_teacher(str(file))
    assert not any(path.is_dir() for path in (home() / "models").iterdir())


def test_embedded_model() -> None:
    teacher = load_teacher(EMBEDDED)
    assert teacher.precision == "dequantized Q4_1 (embedded copy)"
    assert teacher.licence == "Apache-2.0"
    assert teacher.model.num_parameters() == MODELS[0].parameters
    tokenizer = teacher.tokenizer
    text = str(
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "What is the capital of France?"}], tokenize=False, add_generation_prompt=True
        )
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    model: Any = teacher.model
    answer = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    # Digits stand alone, and the blanks before them together, as in the original model's tokenizer.
    assert tokenizer.tokenize("12\n\n34  5") == ["1", "2", "ĊĊ", "3", "4", "ĠĠ", "5"]


def test_embedded_summary_and_skeleton() -> None:
    facts = summary(EMBEDDED)
    assert (facts.blocks, facts.layers, facts.binarized) == (30, 210, 106_168_320)
    assert facts.kept == {"embeddings": 28_311_552, "norms, biases and other": 35_136}
    assert facts.parameters == MODELS[0].parameters
    assert facts.context_length == 8192
    assert facts.chat_template
    assert len(load_tokenizer(EMBEDDED)) == 49_152


def test_catalogue_counts_match_the_architectures() -> None:
    shapes: dict[str, tuple[str, dict[str, Any]]] = {
        "gpt2": ("gpt2", {}),
        "phi-3-mini-4k-instruct": ("phi3", {}),
        "llama-2-7b": ("llama", {"vocab_size": 32_000}),
        "opt-1.3b": (
            "opt",
            {"hidden_size": 2048, "ffn_dim": 8192, "num_hidden_layers": 24, "num_attention_heads": 32}
            | {"word_embed_proj_dim": 2048},
        ),
        "qwen3-0.6b": (
            "qwen3",
            {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
            | {"num_key_value_heads": 8, "head_dim": 128, "tie_word_embeddings": True},
        ),
    }
    known = {entry.id: entry.parameters for entry in MODELS}
    for name, (model_type, settings) in shapes.items():
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings))
        assert model.num_parameters() == known[name], name


def test_home_follows_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(tmp_path))
    assert home() == tmp_path
    monkeypatch.delenv("LBLLM_HOME")
    assert home() == Path.home() / ".cache" / "lbllm"
