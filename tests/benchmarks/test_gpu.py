"""The benchmark for GPUs, its parts tried on the CPU with a tiny model; without a GPU it says that it needs one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.report import read_report
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_runs import run_config, run_tiny, stored_run_config, tiny_teacher


def call(monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.setattr(sys, "argv", ["gpu", *words])
    gpu.main()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("part", ["tests", "training", "decode", "embedded"])
def test_without_a_gpu_it_says_so(
    part: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        call(monkeypatch, part)
    assert end.value.code == 2
    assert capsys.readouterr().err == "This benchmark needs a GPU that torch can use, and this machine has none.\n"


@pytest.mark.soak
def test_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config, out = stored_run_config(tmp_path), tmp_path / "out.json"
    small = config.model_copy(update={"preset": "custom"})
    monkeypatch.setattr(gpu, "make_config", lambda preset: small)
    words = ["--device", "cpu", "--model", config.model, "--corpus", config.corpus, "--steps", "3"]
    call(monkeypatch, "training", *words, "--out", str(out))
    ptq, wat, aar = read_report(out).rows
    assert [ptq["stage"], wat["stage"], aar["stage"]] == ["ptq", "wat", "aar"]
    for row in (wat, aar):
        assert isinstance(row["share_of_peak"], float)
        assert 0 < row["share_of_peak"] < 1


@pytest.mark.soak
def test_decode(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_tiny(run_config(), tmp_path / "run", tiny_teacher("llama"))
    teacher = str(save_tiny(tmp_path / "teacher", "llama"))
    rows = gpu.decode(teacher, str(tmp_path / "run" / "checkpoint"), "cpu", 8, 4, 0.1)
    packed, dense, ratio = rows
    for key in ("prefill_tokens_per_second", "decode_tokens_per_second"):
        assert ratio[key] == pytest.approx(packed[key] / dense[key])


def test_the_run_of_the_embedded_model_goes_on(tmp_path: Path) -> None:
    config = stored_run_config(tmp_path)
    stopped = {row["label"]: row["value"] for row in gpu.embedded(config, tmp_path / "run", 0)}
    assert stopped["done"] == 0
    ended = {row["label"]: row["value"] for row in gpu.embedded(config, tmp_path / "run", 100)}
    assert ended["done"] == 1
    assert ended["seconds"] > stopped["seconds"]
    hours = ended["seconds"] / config.wat.tokens * 16_777_216 / 3600
    assert ended["hours for 16,777,216 tokens"] == pytest.approx(hours)


def test_its_settings_are_those_of_standard_without_stage_4() -> None:
    config = gpu.embedded_config("tiny", "embedded", "cpu", 2**20)
    assert config.stages == ("ptq", "wat", "aar")
    assert config.wat.tokens == config.aar.tokens == 2**20
