"""GGUF files in llama.cpp itself: logits and splits are those of transformers.

Only where LBLLM_LLAMA_CPP names a folder into which npm has put node-llama-cpp, see ``benchmarks.gguf_agree``.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from benchmarks.llama_quantize import library_in
from benchmarks.report import ROOT
from lbllm.checkpoints.find import find_checkpoint
from lbllm.checkpoints.hf import load
from lbllm.sections import QuantConfig
from lbllm.share.export import export
from lbllm.share.gguf import write_gguf
from lbllm.share.gguf_names import SHAPES, GgufType
from tests.helpers.tiny_models import SENTENCES, tiny, tiny_config, tiny_tokenizer
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.share.test_sentencepiece import made

FOLDER = os.environ.get("LBLLM_LLAMA_CPP", "")
pytestmark = [pytest.mark.soak, pytest.mark.skipif(not FOLDER, reason="LBLLM_LLAMA_CPP names no llama.cpp")]

SLIDING = [*["sliding_attention"] * 5, "full_attention"]
BASES = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0}} | {
    "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0}
}
PARTIAL = {"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5}
GEMMA2 = {"head_dim": 16, "query_pre_attn_scalar": 16, "sliding_window": 8, "num_hidden_layers": 3}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "biases": ("llama_bias", {}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {}),
    "mistral": ("mistral", {"sliding_window": 64}),
    "wide heads": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "phi3": ("phi3", {}),
    "partly rotary": ("phi3", {"rope_parameters": PARTIAL}),
    "gemma2": ("gemma2", GEMMA2),
    "gemma3": ("gemma3", {"num_hidden_layers": 7, "layer_types": [*SLIDING, "sliding_attention"]}),
    "stretched": ("gemma3", {"num_hidden_layers": 6, "layer_types": SLIDING, "rope_parameters": BASES}),
}
IDS = np.random.default_rng(0).integers(3, 250, (2, 48)).astype(np.int32)


def in_llama_cpp(file: Path, given: Path, out: Path, *options: str) -> None:
    command = [sys.executable, "-m", "benchmarks.llama_logits", str(library_in(Path(FOLDER).resolve()))]
    subprocess.run([*command, str(file), str(given), str(out), *options], cwd=ROOT, check=True)


def logits_of(file: Path, scratch: Path) -> torch.Tensor:
    np.save(scratch / "ids.npy", IDS)
    in_llama_cpp(file, scratch / "ids.npy", scratch / "logits.npy")
    return torch.from_numpy(np.load(scratch / "logits.npy"))


def gemma2() -> Any:
    """A tiny Gemma 2, which is none of the helper's architectures."""
    settings = tiny_config("gemma3").to_dict()
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
    config = AutoConfig.for_model("gemma2", **{key: settings[key] for key in kept}, **GEMMA2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
        for parameter in model.parameters():
            parameter.data += 0.1 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def apart(found: torch.Tensor, model: Any) -> float:
    """The largest error of a position's logits, relative to their spread."""
    wanted = model(torch.from_numpy(IDS).long()).logits
    return float(((found - wanted).std(-1) / wanted.std(-1)).max())


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """llama.cpp rounds the inputs of its layers to bfloat16; another rule anywhere changes logits by their spread."""
    architecture, changes = MODELS[name]
    model = gemma2() if architecture == "gemma2" else tiny(architecture, **changes)[0]
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data = parameter.data.bfloat16().float()
    write_gguf(model, tiny_tokenizer(), tmp_path / "m.gguf", name="Tiny", licence=None)
    assert apart(logits_of(tmp_path / "m.gguf", tmp_path), model) < 0.04


@pytest.mark.parametrize("kind", SHAPES)
def test_every_type_is_read(kind: GgufType, tmp_path: Path) -> None:
    quant = QuantConfig(group_size=64, act_bits=16, kv_bits=16)
    folder, _ = tiny_checkpoint(tmp_path, "llama", quant, hidden_size=256, intermediate_size=512)
    (file,) = export(find_checkpoint(str(folder)), "gguf", tmp_path / "out", gguf_type=kind).path.glob("*.gguf")
    model, _ = load(folder, dtype=torch.float32)
    # Random layers amplify what a type rounds; blocks that are read in another way give unrelated logits (1.4).
    assert apart(logits_of(file, tmp_path), model) < (0.15 if kind in ("bf16", "q8_0") else 0.5)


@pytest.mark.parametrize(
    ("form", "prefix", "strips"),
    [("normalizer", True, False), ("normalizer", False, False), ("metaspace", True, False), ("normalizer", True, True)],
)
def test_pieces_are_split_alike(form: str, prefix: bool, strips: bool, tmp_path: Path) -> None:
    tokenizer, name = made(prefix=prefix, form=form, strips=strips), "Phi-3" if strips else "Tiny"
    model, _ = tiny("llama", vocab_size=len(tokenizer))
    write_gguf(model, tokenizer, tmp_path / "m.gguf", name=name, licence=None)
    texts = [*SENTENCES, "Ünïcode 東京 🙂\n\n\tx  y   z", "<|user|>\nHi there<|end|>\n<|user|> again", "a"]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    in_llama_cpp(tmp_path / "m.gguf", tmp_path / "texts.json", tmp_path / "ids.json", "--tokenize")
    wanted = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    if form == "metaspace":  # puts no space before one
        texts, wanted = texts[:-2], wanted[:-2]
    found = json.loads((tmp_path / "ids.json").read_text())
    assert found[: len(texts)] == wanted
