"""The table by file size: what is asked of llama.cpp, and what is printed. The library itself is not in the lock."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from benchmarks import file_sizes, llama_quantize
from lbllm.models.blocks import decoder_blocks, linear_layers
from lbllm.models.teacher import Teacher, load_teacher
from tests.helpers.tiny_models import SENTENCES, save_tiny


def test_options_lie_where_llama_cpp_reads_them() -> None:
    options = llama_quantize._Options
    # Four 32-bit numbers, six booleans, then a pointer.
    assert (options.type.offset, options.allow_requantize.offset, options.importance.offset) == (4, 16, 24)
    assert len(set(llama_quantize.TYPES.values())) == len(llama_quantize.TYPES)


def test_a_folder_without_the_library_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no libllama"):
        llama_quantize.library_in(tmp_path)


def test_importance_is_the_mean_squared_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher: Teacher = load_teacher(str(save_tiny(tmp_path / "teacher", "llama")))
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 8))
    monkeypatch.setattr(file_sizes, "open_teacher", lambda name: teacher)
    monkeypatch.setattr(file_sizes, "CALIBRATION", 64)
    monkeypatch.setattr(file_sizes, "CALIBRATION_LENGTH", 32)
    found = file_sizes.importance(str(tmp_path / "text.txt"))
    blocks = decoder_blocks(teacher.model)[1]
    assert len(found) == sum(len(linear_layers(block)) for block in blocks)
    assert {name.split(".", 2)[2] for name in found} >= {"attn_q.weight", "attn_output.weight", "ffn_down.weight"}
    assert found["blk.1.ffn_down.weight"].shape == (90,)
    # Queries, keys and values read the same input.
    assert torch.equal(found["blk.0.attn_q.weight"], found["blk.0.attn_v.weight"])


def test_only_what_is_missing_is_made(tmp_path: Path) -> None:
    given = argparse.Namespace(folder=tmp_path, types="Q4_0,Q2_K", checkpoint=["runs/mine"])
    names = [path.stem for path, *_ in file_sizes.missing(given)]
    assert names == [
        "llama.cpp-embedded",
        "llama.cpp-Q4_0",
        "llama.cpp-Q4_0-imatrix",
        "llama.cpp-Q2_K",
        "llama.cpp-Q2_K-imatrix",
        "ours-runs+mine",
    ]
    (tmp_path / "llama.cpp-Q4_0.json").write_text("{}")
    assert "llama.cpp-Q4_0" not in [path.stem for path, *_ in file_sizes.missing(given)]
    printed = file_sizes.table([{"label": "a", "mb": 91.73, "wikitext2": 25.0, "model_mb": 150}])
    assert printed.splitlines()[-1] == "| a | 91.7 | 25.00 | 150 |"
