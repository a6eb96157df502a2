"""The estimate: true bits, disk to the byte, memory by named terms, time, and errors before anything is loaded."""

from __future__ import annotations

import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from lbllm.config import RunConfig, make_config
from lbllm.errors import ConfigError, ResourceError
from lbllm.events import RunDone
from lbllm.machine import fastest_matmul_rate, free_memory
from lbllm.measure.estimate import Estimate, check_disk, check_memory, estimate
from lbllm.measure.needs import STREAMS, Needs
from lbllm.pipeline.run import run
from lbllm.sections import STAGES
from lbllm.units import against_16_bits
from tests.helpers import ROOT
from tests.helpers.tiny_models import DENSE_ARCHITECTURES, SENTENCES, save_tiny, tiny, tiny_config


def _config(model: Path | str, stages: tuple[str, ...] = ("ptq", "wat", "aar"), **quant: Any) -> RunConfig:
    small = {"tokens": 64, "batch_tokens": 32}
    changes: dict[str, Any] = {"model": str(model), "seq_len": 16, "stages": stages, "device": "cpu"}
    changes |= {"ptq": {"tokens": 64}, "wat": small, "aar": small | {"search_tokens": 16}}
    return make_config("quick", changes | {"quant": {"group_size": 32, "param_bits": 16} | quant})


def _estimate(architecture: str, folder: Path, **quant: Any) -> Estimate:
    return estimate(_config(save_tiny(folder, architecture), **quant))


@pytest.mark.parametrize("architecture", DENSE_ARCHITECTURES)
def test_counts_are_those_of_the_model(architecture: str, tmp_path: Path) -> None:
    result = _estimate(architecture, tmp_path)
    model, _ = tiny(architecture)
    assert result.weights + result.dense_weights == model.num_parameters()
    assert result.blocks == model.config.num_hidden_layers
    assert sum(result.parts.values()) == result.disk_bytes
    assert sum(result.memory_parts.values()) == result.memory_bytes
    assert sum((result.stage_seconds | result.other_seconds).values()) == pytest.approx(result.seconds)
    assert all(size >= 0 for size in (result.parts | result.memory_parts).values())
    stored = result.parts["bits"] + result.parts["bitmap"] + result.parts["parameters"]
    assert result.bpw == pytest.approx(8 * stored / result.weights)


def _embedded(**quant: Any) -> Estimate:
    return estimate(make_config("quick", {"quant": {"param_bits": 16} | quant, "device": "cpu"}))


@pytest.mark.parametrize(
    ("quant", "bpw"),
    [
        ({"group_size": 64}, 3.0),
        ({"group_size": 32}, 4.0),
        ({"group_size": 64, "format": "w1"}, 1.5),
        # 8-bit parameters and, for each row and parameter, two 16-bit numbers.
        ({"group_size": 64, "param_bits": 8}, 2.5 + 128 * (3072 + 576 + 960 + 576) / 3_538_944),
        # 4-bit parameters, a 16-bit scale for each row, eight 16-bit numbers for each of the seven layers.
        ({"group_size": 16, "param_bits": 4}, 3.0 + 16 * (5184 + 7 * 8) / 3_538_944),
        # 576 = 4 * 128 + 64: the short group has its parameters too.
        ({"group_size": 128}, 2 + 64 * (5 * (3072 + 576 + 960) + 12 * 576) / 3_538_944),
        ({"group_size": -1}, 2 + 64 * (3072 + 576 + 960 + 576) / 3_538_944),
    ],
)
def test_true_bits_of_the_embedded_model(quant: dict[str, Any], bpw: float) -> None:
    assert _embedded(**quant).bpw == pytest.approx(bpw, rel=1e-12)


def test_embedded_model() -> None:
    result = _embedded(group_size=64)
    assert (result.blocks, result.weights, result.dense_weights) == (30, 106_168_320, 28_346_688)
    assert result.parts["embeddings"] == 2 * 28_311_552
    assert result.parts["bits"] == result.parts["bitmap"] == 106_168_320 // 8
    assert result.parts["parameters"] == 106_168_320 // 64 * 8
    assert result.memory_bytes < 4 * 2**30
    dearer = estimate(make_config("standard", {"device": "cpu", "stages": ["ptq", "wat", "aar"]}))
    assert dearer.needs.disk["states of the blocks"] > 5 * 106_168_320
    assert dearer.seconds > 2 * result.seconds


def test_overrides_and_skipped_layers(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    plain = estimate(_config(folder, format="w1"))
    mixed = estimate(_config(folder, format="w1", overrides={"*.down_proj": {"format": "w1+1", "group_size": -1}}))
    skipped = estimate(_config(folder, format="w1", skip=["*.down_proj"]))
    down = 2 * 90 * 48
    assert plain.parts["bitmap"] == 0
    assert mixed.parts["bitmap"] == 2 * 48 * math.ceil(90 / 8)
    assert skipped.weights == plain.weights - down
    assert skipped.dense_weights == plain.dense_weights + down
    assert skipped.disk_bytes > plain.disk_bytes


@pytest.mark.parametrize(
    ("quant", "message"),
    [
        ({"group_size": 64}, r"64 .*model\.layers\.0\.self_attn\.q_proj, which has 48 weights.*-1"),
        ({"overrides": {"*.k_proj": {"group_size": 49}}}, r"49 .*self_attn\.k_proj, which has 48"),
        ({"skip": ["*"]}, "no layer to binarize"),
        ({"skip": ["*.dwon_proj"]}, r"'\*\.dwon_proj' matches no layer.*model\.layers\.0\.self_attn\.q_proj"),
        ({"overrides": {"layers.9.*": {"act_bits": 8}}}, r"'layers\.9\.\*' matches no layer"),
    ],
)
def test_settings_that_do_not_fit(quant: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _estimate("llama", tmp_path, **quant)


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_sequences_longer_than_the_models_context_are_refused(architecture: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, architecture)
    config = _config(folder).model_copy(update={"seq_len": 256})
    assert estimate(config).blocks == 2
    with pytest.raises(
        ConfigError, match=r"seq_len \(Sequence length\) 257 is more than the model's context of 256 tokens"
    ):
        estimate(config.model_copy(update={"seq_len": 257}))


@pytest.mark.parametrize(
    ("architecture", "stages", "quant"),
    [
        ("llama", ("ptq", "wat", "aar"), {"group_size": 16}),
        ("llama_bias", ("ptq", "wat", "aar"), {"param_bits": 8, "act_bits": 8}),
        ("gemma3", ("ptq",), {"format": "w1", "group_size": -1}),
        ("llama", ("ptq", "wat"), {"param_bits": 4, "group_size": 10}),
        ("llama_bias", ("ptq",), {"param_bits": 4, "format": "w1"}),
        ("gpt2", ("ptq",), {"skip": ["*.c_proj"]}),
        ("opt", ("ptq", "wat"), {"overrides": {"*.fc2": {"param_bits": 8, "group_size": 20}}}),
        ("gpt_neox", ("ptq",), {"group_size": 48, "act_bits": 16}),
    ],
)
def test_checkpoint_has_the_size_that_was_said(
    architecture: str, stages: tuple[str, ...], quant: dict[str, Any], tmp_path: Path
) -> None:
    folder = save_tiny(tmp_path / "model", architecture)
    text = tmp_path / "text.jsonl"
    rng = random.Random(0)
    rows = [{"text": " ".join(rng.choices(SENTENCES, k=3))} for _ in range(40)]
    text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(folder, stages, **quant).model_copy(update={"corpus": str(text)})
    said = estimate(config)
    *_, done = run(config, tmp_path / "run", request=lambda: None)
    assert isinstance(done, RunDone)
    # transformers gives some tensors other names in its files, so the header can differ by a few bytes.
    assert abs(done.disk_bytes - said.disk_bytes) <= 16
    assert done.bpw == pytest.approx(said.bpw)


def test_hidden_states_lie_on_disk_where_memory_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = _config(save_tiny(tmp_path, "llama"))
    config = config.model_copy(update={"wat": config.wat.model_copy(update={"tokens": 3_000_000})})
    ample = estimate(config, rate=1e9).needs
    monkeypatch.setattr("lbllm.measure.needs.free_memory", lambda device: sum(ample.memory.values()) - 1)
    short = estimate(config, rate=1e9).needs
    states = STREAMS
    assert (ample.streams, short.streams) == ("memory", "disk")
    assert states not in ample.disk
    assert short.disk[states] == 2 * 3_000_000 * 48 * getattr(torch, config.stream_dtype).itemsize
    assert sum(short.memory.values()) < sum(ample.memory.values())
    both = config.model_copy(update={"wat": config.wat.model_copy(update={"streams": "both"})})
    assert estimate(both, rate=1e9).needs.disk[states] == 3 * short.disk[states] // 2
    # Stage 1 keeps the inputs of layers there, too, in bfloat16: of q, k, v; of o; of gate and up; of down.
    first = config.model_copy(update={"stages": ("ptq",), "stream_dtype": "float32"})
    monkeypatch.setattr("lbllm.measure.needs.free_memory", lambda device: 0)
    assert estimate(first, rate=1e9).needs.disk[states] == config.ptq.tokens * (2 * 4 * 48 + 2 * (3 * 48 + 90))


def test_a_model_of_many_blocks_needs_the_memory_of_one(tmp_path: Path) -> None:
    shallow, deep = (save_tiny(tmp_path / str(n), "llama", num_hidden_layers=n) for n in (2, 12))
    found = [estimate(_config(folder), rate=1e9).needs for folder in (shallow, deep)]
    assert sum(found[0].memory.values()) == pytest.approx(sum(found[1].memory.values()), rel=1e-3)
    assert sum(found[0].disk.values()) < sum(found[1].disk.values()) / 3


def test_memory_grows_with_what_is_asked(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path, "llama")
    config = _config(folder)
    base = estimate(config).memory_bytes
    for stage, key in (("wat", "tokens"), ("aar", "batch_tokens"), ("ptq", "tokens")):
        larger = getattr(config, stage).model_copy(update={key: 3_000_000})
        assert estimate(config.model_copy(update={stage: larger})).memory_bytes > base + 10**8
    # Stage 4 holds a graph of the whole model.
    with torch.device("meta"):
        deep = AutoModelForCausalLM.from_config(tiny_config("llama", num_hidden_layers=64))
    whole = config.model_copy(update={"stages": STAGES, "e2e": config.e2e.model_copy(update={"seq_len": 20_000})})
    less, more = (estimate(one.model_copy(update={"seq_len": 256}), model=deep) for one in (config, whole))
    assert more.memory_bytes > less.memory_bytes + 10**7


def test_a_relaxed_bitmap_takes_memory_of_its_own(tmp_path: Path) -> None:
    config = _config(save_tiny(tmp_path, "llama"), ("ptq", "wat"))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(tiny_config("llama", hidden_size=8192, intermediate_size=8192))
    relaxed = config.model_copy(update={"wat": config.wat.model_copy(update={"bitmap": "relaxed"})})
    coupled, more = (estimate(one, model=model, rate=1e9) for one in (config, relaxed))
    # Numbers and two moments for each weight of one of the two blocks.
    assert more.memory_bytes - coupled.memory_bytes == 12 * coupled.weights // 2


_PEAK = """
import re, sys, threading, time
from pathlib import Path
from lbllm.config import RunConfig
from lbllm.pipeline.run import run
peak = [0]
def watch():
    while True:
        found = re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())
        peak[0] = max(peak[0], 1024 * int(found[1]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
config = RunConfig.model_validate_json(sys.argv[1])
for _ in run(config, Path(sys.argv[2]), request=lambda: None):
    pass
print(peak[0])
"""


@pytest.mark.soak
@pytest.mark.parametrize(("vocabulary", "loss"), [(131_072, "forward_kl"), (131_072, "eakld"), (320, "forward_kl")])
def test_memory_of_stage_4_is_that_of_a_process(vocabulary: int, loss: str, tmp_path: Path) -> None:
    folder = save_tiny(
        tmp_path / "model", "llama", vocab_size=vocabulary, hidden_size=64, intermediate_size=128,
        max_position_embeddings=1024,
    )  # fmt: skip
    text = tmp_path / "text.txt"
    generator = random.Random(0)
    text.write_text("\n".join(" ".join(generator.choices(SENTENCES, k=4)) for _ in range(900)))
    e2e = {"tokens": 512, "batch_tokens": 512, "lr_weight": 1e-3, "seq_len": 256, "loss": loss}
    changes: dict[str, Any] = {"model": str(folder), "corpus": str(text), "seq_len": 256, "device": "cpu"}
    changes |= {"stages": ["ptq", "e2e"], "ptq": {"tokens": 1024}, "e2e": e2e, "quant": {"group_size": 16}}
    config = make_config("quick", changes)
    arguments = [sys.executable, "-c", _PEAK, config.model_dump_json(), str(tmp_path / "run")]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True, check=True)
    assert estimate(config, rate=1e9).memory_bytes == pytest.approx(int(done.stdout.split()[-1]), rel=0.15)


def test_stage_4_takes_time_of_its_own(tmp_path: Path) -> None:
    config = _config(save_tiny(tmp_path, "llama"), stages=STAGES)
    times = [
        estimate(config.model_copy(update={"e2e": config.e2e.model_copy(update={"tokens": tokens})}), rate=1e9)
        for tokens in (3_200, 4_800, 6_400)
    ]
    one, two, three = (result.stage_seconds["e2e"] for result in times)
    assert three - two == pytest.approx(two - one)
    assert three > 1.8 * one
    # Teacher and student forward, student backward: at least 8 FLOPs a binarized weight and token.
    assert one >= 8 * times[0].weights * 3_200 / 1e9


def test_the_run_of_a_tiny_model_takes_the_time_of_its_start_its_blocks_and_its_evaluations(tmp_path: Path) -> None:
    config = _config(save_tiny(tmp_path, "llama"))
    result = estimate(config, rate=1e15)  # products take no time at all
    assert result.seconds > 8
    assert all(seconds > 0.1 for seconds in result.stage_seconds.values())
    more = config.model_copy(update={"wat": config.wat.model_copy(update={"epochs": 100})})
    assert estimate(more, rate=1e15).stage_seconds["wat"] > 10 * result.stage_seconds["wat"]
    slow, fewer = (estimate(one, rate=1e9) for one in (config, config.model_copy(update={"stages": ("ptq",)})))
    # The teacher and the model after each stage are evaluated on the held-out text.
    assert slow.other_seconds["evaluation"] == pytest.approx(2 * fewer.other_seconds["evaluation"])


def test_one_model_has_one_factor_wherever_its_size_is_stated() -> None:
    result = _embedded(group_size=16, param_bits=4)
    assert result.parameters == 134_515_008
    assert against_16_bits(result.disk_bytes, result.parameters) == "2.8 times smaller than in 16 bits"
    assert against_16_bits(4 * result.parameters, result.parameters) == "2.0 times larger than in 16 bits"
    assert against_16_bits(2 * result.parameters + 1000, result.parameters) == "about as large as in 16 bits"


def test_too_little_memory_or_disk_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = _embedded(group_size=64)
    assert free_memory("cpu") > 0
    small, large = (
        replace(result, needs=Needs({"dense block": size}, {}, {"checkpoint": size}, "memory")) for size in (1, 10**15)
    )
    check_memory(small, "cpu")
    # Several processes share the hidden states; each has all else.
    parts = {"dense block": 10, STREAMS: 70}
    shared = replace(result, needs=Needs(parts, {}, {}, "memory"))
    monkeypatch.setattr("lbllm.measure.estimate.free_memory", lambda device: 100)
    check_memory(shared, "cpu", 3)
    with pytest.raises(ResourceError, match=r"dense block 0\.00 GB"):
        check_memory(shared, "cpu", 4)
    monkeypatch.undo()
    check_disk(small, tmp_path / "runs" / "of" / "nobody")
    with pytest.raises(
        ResourceError, match=r"needs about 1000000\.00 GB of memory .* are free.*dense block 1000000\.00 GB"
    ):
        check_memory(large, "cpu")
    with pytest.raises(ResourceError, match=r"1000000\.00 GB of disk space .* are free.*checkpoint 1000000\.00 GB"):
        check_disk(large, tmp_path)


def test_rate_is_measured_quickly() -> None:
    fastest_matmul_rate("cpu")
    began = time.perf_counter()
    assert 1e8 < fastest_matmul_rate("cpu") < 1e15
    assert time.perf_counter() - began < 3  # 0.2 s on an idle machine
