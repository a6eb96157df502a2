"""Checkpoints in transformers: registration, the guard against loading without lbllm, saving again, the KV cache."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

import lbllm
from lbllm.checkpoints.hf import is_checkpoint
from lbllm.checkpoints.seal import seal_again
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.errors import CheckpointError, ConfigError
from lbllm.quant.kv_cache import PackedKVLayer
from lbllm.quant.packed_layer import PackedLinear
from tests.helpers import ROOT
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf")
    run_tiny(run_config(), folder, tiny_teacher("llama"))
    return folder / "checkpoint"


@pytest.fixture
def copied(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "copied"))


@pytest.fixture(scope="module")
def saved_again(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint loaded by transformers and saved by its own method."""
    folder = tmp_path_factory.mktemp("again") / "checkpoint"
    model, tokenizer = lbllm.load(checkpoint)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=1)).logits


def edit(folder: Path, **changes: Any) -> None:
    """Change keys of config.json; a dict changes keys of the section, None removes one."""
    path = folder / "config.json"
    document = json.loads(path.read_text())
    for key, value in changes.items():
        if value is None:
            del document[key]
        else:
            document[key] = document[key] | value if isinstance(value, dict) else value
    path.write_text(json.dumps(document))


# A process that never heard of lbllm: what each way of loading each folder ends in, as JSON.
WITHOUT = """
import json, sys
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM, pipeline, utils
utils.logging.set_verbosity_error()
ways = {
    "auto": AutoModelForCausalLM.from_pretrained,
    "class": LlamaForCausalLM.from_pretrained,
    "body": AutoModel.from_pretrained,
    "ignore": lambda folder: AutoModelForCausalLM.from_pretrained(folder, ignore_mismatched_sizes=True),
    "pipeline": lambda folder: pipeline("text-generation", folder),
}
ends = []
for folder in sys.argv[1:]:
    ends.append({})
    for name, way in ways.items():
        try:
            way(folder)
            ends[-1][name] = "loaded"
        except Exception as error:
            ends[-1][name] = str(error)
assert not any(name.startswith("lbllm") for name in sys.modules)
print(json.dumps(ends))
"""


def test_without_lbllm_it_fails_and_says_what_to_do(checkpoint: Path, saved_again: Path, tmp_path: Path) -> None:
    unguarded = Path(shutil.copytree(checkpoint, tmp_path / "unguarded"))
    edit(unguarded, transformers_weights=None)
    bare = Path(shutil.copytree(checkpoint, tmp_path / "bare"))
    edit(bare, transformers_weights=None, quantization_config=None)
    command = [sys.executable, "-c", WITHOUT, *map(str, (checkpoint, saved_again, unguarded, bare))]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    guarded, again, *others = json.loads(result.stdout)
    for ends in (guarded, again):
        for way, end in ends.items():
            assert "PACKED BY LBLLM" in end, way
            assert "`import lbllm`" in end, way
    # Where the guard is lost, the shapes of the packed tensors fit no dense layer.
    for ends in others:
        for way in ("auto", "class", "body", "pipeline"):
            assert "ignore_mismatched_sizes" in ends[way]


def test_with_lbllm_in_a_fresh_process_it_just_loads(checkpoint: Path, saved_again: Path, tmp_path: Path) -> None:
    script = """
import sys
import lbllm, torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, pipeline
ids = torch.load(sys.argv[1])
first, second = sys.argv[2:]
models = [
    AutoModelForCausalLM.from_pretrained(first, dtype=torch.float32),
    LlamaForCausalLM.from_pretrained(second),
    lbllm.load(second)[0],
]
with torch.no_grad():
    torch.save([model(ids).logits for model in models], sys.argv[1])
talk = pipeline("text-generation", first)
assert talk("The river", max_new_tokens=3)[0]["generated_text"].startswith("The river")
"""
    torch.save(token_ids(2, seed=1), tmp_path / "ids.pt")
    command = [sys.executable, "-c", script, str(tmp_path / "ids.pt"), str(checkpoint), str(saved_again)]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert result.returncode == 0, result.stderr
    here = logits(lbllm.load(checkpoint)[0])
    for there in torch.load(tmp_path / "ids.pt"):
        torch.testing.assert_close(there, here, rtol=0, atol=1e-5)


def test_saved_again_it_is_a_checkpoint_like_the_first(checkpoint: Path, saved_again: Path, tmp_path: Path) -> None:
    model, tokenizer = lbllm.load(checkpoint, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "same")
    tokenizer.save_pretrained(tmp_path / "same")
    # In the dtype it was packed in, to the byte.
    assert (tmp_path / "same" / WEIGHTS).read_bytes() == (checkpoint / WEIGHTS).read_bytes()
    documents = [json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "same", checkpoint)]
    for document in documents:  # transformers writes more into a tokenizer's settings when it saves them again
        del document["quantization_config"]["seal"]["files"]["tokenizer_config.json"]
    assert documents[0] == documents[1]
    assert torch.equal(logits(lbllm.load(saved_again)[0]), logits(lbllm.load(checkpoint)[0]))
    with pytest.raises(ConfigError, match=r"model\.push_to_hub"):
        model.save_pretrained(tmp_path / "hub", push_to_hub=True)
    with pytest.raises(ConfigError, match=r"no variants.*leave out variant"):
        model.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant").exists()


def test_in_bfloat16_the_packed_parameters_keep_their_precision(checkpoint: Path) -> None:
    exact, rounded = lbllm.load(checkpoint)[0], lbllm.load(checkpoint, dtype=torch.bfloat16)[0]
    assert rounded.dtype == torch.bfloat16
    tensors = exact.state_dict()
    for name, layer in rounded.named_modules():
        if isinstance(layer, PackedLinear):
            same = exact.get_submodule(name)
            assert isinstance(same, PackedLinear)
            assert torch.equal(layer.dequantize(), same.dequantize())
            assert layer.quantizer is not None
            assert torch.equal(layer.quantizer.act, tensors[f"{name}.quantizer.act"])
    assert logits(rounded).isfinite().all()


def test_loading_neither_prints_nor_warns(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    model: Any = lbllm.load(checkpoint)[0]
    model.generate(token_ids(1), max_new_tokens=2)
    assert capfd.readouterr() == ("", "")


def rewrite(folder: Path, change: Any) -> None:
    """Change the tensors of a checkpoint and put the right hash beside them: only their content tells."""
    path = folder / WEIGHTS
    with safe_open(path, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    seal(folder)


def seal(folder: Path) -> None:
    """Put the right hashes beside changed weights."""
    edit(folder, quantization_config={"tensors_sha256": hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()})
    seal_again(folder)


def flip(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(bytes(data))


def truncate_and_seal(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-100])
    seal(folder)


LAYER = "model.layers.1.mlp.down_proj"
DAMAGES: dict[str, tuple[Any, tuple[str, ...]]] = {
    "no folder": (shutil.rmtree, ("copied/config.json does not exist", "give the folder")),
    "no config": (lambda f: (f / "config.json").unlink(), ("copied/config.json does not exist",)),
    "no json": (lambda f: (f / "config.json").write_text("{"), ("copied/config.json can't be read", "again")),
    "foreign": (lambda f: edit(f, quantization_config={"quant_method": "gptq"}), ("copied was not packed by LBLLM",)),
    "dense": (lambda f: edit(f, quantization_config=None), ("copied was not packed by LBLLM", "give the folder")),
    "newer": (lambda f: edit(f, quantization_config={"version": 2}), ("config.json has layout version 2", "Install")),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), (f"{WEIGHTS} does not exist", "make the checkpoint again")),
    "flipped bit": (lambda f: flip(f / WEIGHTS, -1), (f"{WEIGHTS} is not the file that was saved", "again")),
    "flipped header": (lambda f: flip(f / WEIGHTS, 40), (f"{WEIGHTS} is not the file that was saved",)),
    "truncated": (
        lambda f: (f / WEIGHTS).write_bytes((f / WEIGHTS).read_bytes()[:-100]),
        (f"{WEIGHTS} is not the file that was saved",),
    ),
    "truncated and sealed": (
        truncate_and_seal,
        ("copied: can't be loaded", "again"),
    ),
    "no hash": (lambda f: edit(f, quantization_config={"tensors_sha256": None}), ("config.json is not the file",)),
    "no hash, no seal": (
        lambda f: edit(f, quantization_config={"tensors_sha256": None, "seal": None}),
        (f"{WEIGHTS} is not the file",),
    ),
    "other bits": (lambda f: edit(f, quantization_config={"quant": {}}), ("config.json: the format",)),
    "missing tensor": (
        lambda f: rewrite(f, lambda t: t.pop(f"{LAYER}.params")),
        ("copied: 1 weights are missing", f"{LAYER}.params", "again"),
    ),
    "missing dense tensor": (lambda f: rewrite(f, lambda t: t.pop("model.norm.weight")), ("model.norm.weight",)),
    "extra tensor": (
        lambda f: rewrite(f, lambda t: t.update({f"{LAYER}.bias": torch.zeros(3)})),
        ("copied: its files have 1 weights that", f"{LAYER}.bias"),
    ),
    "wrong shape": (
        lambda f: rewrite(f, lambda t: t.update({f"{LAYER}.weight": t[f"{LAYER}.weight"][:, :1].clone()})),
        (f"copied: {LAYER}.weight has shape", "again"),
    ),
    "no tokenizer": (
        lambda f: [path.unlink() for path in f.glob("tokenizer*")],
        ("copied/tokenizer.json is missing", "copy or make the checkpoint again"),
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_load_fails_closed(copied: Path, damage: str) -> None:
    change, parts = DAMAGES[damage]
    change(copied)
    with pytest.raises(CheckpointError) as caught:
        lbllm.load(copied)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"act_bits": 8},
        {"kv_bits": 8},
        {"act_group_size": 16},
        {"tail_steps": 6},
        {"group_size": 17},
        {"skip": ["*.q_proj"]},
    ],
)
def test_another_format_beside_the_same_tensors_is_refused(copied: Path, change: dict[str, Any]) -> None:
    """Most of these would load: the tensors have the same shapes in both formats."""
    quant = json.loads((copied / "config.json").read_text())["quantization_config"]["quant"]
    edit(copied, quantization_config={"quant": quant | change})
    for load in (lbllm.load, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match="not the one its tensors were packed in"):
            load(copied)


def test_is_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    assert is_checkpoint(checkpoint)
    assert not is_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert not is_checkpoint(str(tmp_path))


def test_a_cache_that_keeps_more_bits_is_refused(checkpoint: Path) -> None:
    model, _ = lbllm.load(checkpoint)
    ids = token_ids(1)
    filled = DynamicCache()
    tiny_teacher("llama").model(ids, past_key_values=filled)
    static = StaticCache(model.config, max_cache_len=64)
    for cache in (filled, static):
        with pytest.raises(ConfigError, match=f"{type(cache).__name__}.*4 bits.*empty DynamicCache"):
            model(ids, past_key_values=cache)


def test_four_bits_take_a_quarter_of_the_cache_and_beams_share_it(checkpoint: Path) -> None:
    model: Any = lbllm.load(checkpoint, dtype=torch.bfloat16)[0]
    ids = token_ids(1)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    heads, size = model.config.num_key_value_heads, model.config.head_dim
    # Two codes a byte, and a minimum and a step of two bytes each for every token and head.
    assert isinstance(cache.layers[0], PackedKVLayer)
    assert cache.layers[0].nbytes() == 2 * ids.shape[1] * heads * (size // 2 + 4)
    greedy = model.generate(ids, max_new_tokens=4, num_beams=1, do_sample=False)
    beams = model.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
    assert greedy.shape[0] == beams.shape[0] == 1
