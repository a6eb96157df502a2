"""The comparison of the presets paper and standard: it knows every difference; its figures are those of its runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import paper
from benchmarks.paper import DIFFERENCES, SAME, compared, last_outputs, relative_error, variants
from benchmarks.report import ROOT, read_report
from lbllm.config import SETTINGS, leaves, make_config
from lbllm.models.teacher import load_teacher
from lbllm.stages.distill import token_error
from tests.helpers.tiny_models import save_tiny

SMALL = ["seq_len=32", "quant.group_size=16", "wat.batch_tokens=64", "aar.batch_tokens=64", "aar.search_tokens=64"]


def test_every_difference_between_the_presets_is_one_variant() -> None:
    one, other = leaves(make_config("paper")), leaves(make_config("standard"))
    different = {path for path in SETTINGS if path != "preset" and one[path] != other[path]}
    switched = [path for paths in DIFFERENCES.values() for path in paths]
    assert len(switched) == len({*switched, *SAME}) - len(SAME)
    assert different == {*switched, *SAME}


def test_the_page_of_the_method_names_every_difference_with_both_values() -> None:
    text = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
    one, other = leaves(make_config("paper")), leaves(make_config("standard"))
    for path in {path for paths in (*DIFFERENCES.values(), SAME) for path in paths} - {"stages"}:
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{path}` ")]
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        assert cells[1:3] == [f"`{json.dumps(one[path])}`", f"`{json.dumps(other[path])}`"], path


def test_a_variant_is_paper_with_one_difference_of_standard() -> None:
    base = {"corpus": "embedded", **{path: 512 for path in SAME if path != "corpus"}}
    runs = {one.label: one for one in variants(base, whole=True)}
    first, *middle, last = runs.values()
    paper_settings, standard = leaves(make_config("paper")) | base, leaves(make_config("standard")) | base
    assert leaves(first.config) == paper_settings
    assert {**leaves(last.config), "preset": ""} == {**standard, "preset": ""}
    for one in middle:
        paths = DIFFERENCES[one.label]
        assert leaves(one.config) == paper_settings | {path: standard[path] for path in paths}
    assert runs["drift correction"].changed == "ptq.align 0.0 → 1.0"
    assert {one.label for one in variants(base, whole=False)} == runs.keys() - {"stage 4"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("paper")
    save_tiny(folder / "teacher", "llama", max_position_embeddings=512)
    rows = [{"text": f"The {k}th old mill stood by the river. " * 20} for k in range(400)]
    (folder / "text.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def measured(place: Path, monkeypatch: pytest.MonkeyPatch, only: str) -> list[dict[str, Any]]:
    words = ["--model", str(place / "teacher"), "--corpus", str(place / "text.jsonl"), "--blocks", "1"]
    words += ["--tokens", "256", "--judge-tokens", "128", "--only", only, "--work", str(place / "work")]
    words += [word for setting in SMALL for word in ("--set", setting)]
    monkeypatch.setattr("sys.argv", ["paper.py", *words, "--out", str(place / "paper.json")])
    paper.main()
    return read_report(place / "paper.json").rows


def test_the_first_block_is_measured_and_shared_stages_are_not_trained_again(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, ranges = measured(place, monkeypatch, "activation ranges of 64 inputs")
    assert (first["label"], first["change"], ranges["label"]) == ("preset paper", 0.0, "activation ranges of 64 inputs")
    assert 0 < first["stage_1"] < first["stage_3"] < 1
    assert (ranges["stage_1"], ranges["stage_2"]) == (first["stage_1"], first["stage_2"])
    assert "perplexity" not in first
    runs = [folder for folder in (place / "work").iterdir() if (folder / "row.json").exists()]
    states = [(folder / "blocks" / "wat-0000.safetensors") for folder in runs]
    assert len(states) == 2
    before = {path: path.stat().st_mtime_ns for path in states}
    # The same command takes what is there, and further variants go on from it.
    again = measured(place, monkeypatch, "activation ranges of 64 inputs;relative loss")
    assert [again[0], again[2]] == [first, ranges]
    assert again[1]["stage_1"] == first["stage_1"]
    assert again[1]["stage_2"] != first["stage_2"]
    assert {path: path.stat().st_mtime_ns for path in states} == before
    (teacher,) = (place / "work" / "models").iterdir()
    assert load_teacher(str(teacher)).model.config.num_hidden_layers == 1


def test_the_error_is_that_of_the_stages(place: Path) -> None:
    model = load_teacher(str(place / "teacher")).model
    ids = torch.arange(24).reshape(2, 12) + 3
    outputs = last_outputs(model, "model.layers", ids)
    assert outputs.shape == (2, 12, model.config.hidden_size)
    noisy = outputs + torch.randn(outputs.shape, generator=torch.Generator().manual_seed(0))
    assert relative_error(noisy, outputs) == pytest.approx(float(token_error(noisy, outputs)))


def test_changes_are_those_of_the_last_stage() -> None:
    rows = compared([{"stage_3": 0.1}, {"stage_3": 0.08}, {"stage_3": 0.1, "stage_4": 0.05}])
    assert [row["change"] for row in rows] == pytest.approx([0, -0.2, -0.5])
