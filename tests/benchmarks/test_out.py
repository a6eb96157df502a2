"""Every benchmark that prints figures keeps them by ``--out``, as rows from which the pages of results are rendered."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from benchmarks import decode, end_to_end, kill_resume, layers, live, visitors
from benchmarks.command_line import one_message
from benchmarks.report import ROOT, read_report
from benchmarks.tables import DOCS, read_tables
from lbllm.measure.perplexity import Divergence
from tests.helpers.tiny_models import save_tiny

# Commands in benchmarks/ that print no figures of their own.
OTHERS = {
    "animation": "makes a picture",
    "frontier_chart": "makes a picture",
    "llama_logits": "is called by gguf_types, in a process of its own",
    "llama_quantize": "is called by file_sizes, in a process of its own",
    "questions": "prints questions",
    "screenshots": "makes pictures",
    "settings_page": "renders the page of settings",
    "tables": "renders the pages of results",
    "quality_outside": "is called by quality, by the Python of another environment",
}
COMMANDS = sorted(
    path.stem for path in (ROOT / "benchmarks").glob("*.py") if "\ndef main(" in path.read_text(encoding="utf-8")
)


def called(monkeypatch: pytest.MonkeyPatch, name: str, *words: str) -> None:
    """Run a benchmark in this process."""
    monkeypatch.setattr("sys.argv", [f"{name}.py", *words])
    importlib.import_module(f"benchmarks.{name}").main()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_with_figures_keeps_them(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, name, "--help")
    assert ended.value.code == 0
    assert ("--out FILE.json" in capsys.readouterr().out) == (name not in OTHERS)


def test_the_exceptions_are_there() -> None:
    assert OTHERS.keys() <= set(COMMANDS)


def test_a_benchmark_writes_what_it_prints(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    teacher, text, out = save_tiny(tmp_path / "teacher", "llama"), tmp_path / "text.txt", tmp_path / "found.json"
    text.write_text(" ".join(f"word{number} of the text." for number in range(400)))
    words = [str(text), "--text", str(text), "--words", "3", "--model", str(teacher)]
    called(monkeypatch, "overlap", *words, "--out", str(out))
    found = read_report(out)
    (row,) = found.rows
    assert f"{row['found']:,} of the {row['runs']:,} runs of 3 words" in capsys.readouterr().out
    assert row["label"] == str(text)
    assert found.command == f"python -m benchmarks.overlap {' '.join(words)}"
    assert found.settings == {"corpus": str(text), "text": str(text), "words": 3, "model": str(teacher)}
    assert shown("overlap") <= row.keys()


def shown(table: str) -> set[str]:
    """The keys of rows that a table of the results shows."""
    columns = read_tables(DOCS / "results" / "tables.toml")[table].columns
    return set(re.findall(r"{(\w+)", " ".join(template for _, template in columns)))


def test_the_rows_of_layers(capsys: pytest.CaptureFixture[str]) -> None:
    row = layers.measure(64, 32, 1, 0.01, 1e10)
    assert shown("layers") == {"model", "layer", *row}
    assert row["fp32_over_a4"] == pytest.approx(row["fp32_ms"] / row["a4_ms"])
    many = layers.measure(64, 32, 2, 0.01, 1e10)
    assert row.keys() - many.keys() == {"bandwidth_a16", "bandwidth_a4"}
    lines = [layers.line({"model": "m", "layer": "64 x 32"} | one) for one in (row, many)]
    assert lines[0].startswith(f"| m 64 x 32 | 1 | {row['fp32_ms']:.3f} | {row['bf16_ms']:.3f} |")
    assert lines[1].endswith(" |  |  |")
    assert len({line.count("|") for line in lines}) == 1


def figures(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Single figures by their labels."""
    for row in rows:
        assert row.keys() == shown("live") == shown("visitors") == shown("space")
    return {row["label"]: row["value"] for row in rows}


def test_the_figures_of_live() -> None:
    closed = [live.Turn(4.0, 0.5, 0.25), live.Turn(6.0, 0.5, 0.25)]
    found = figures(live.report(closed, [live.Turn(4.5, 2.5, 12.0, [0.5, 1.0, float("inf")])]))
    assert found["event to screen, median"] == 1.0
    assert found["event to screen, the slowest event"] == float("inf")
    assert found["CPU of the browser, page open"] == 12.0
    assert found["slow-down of the run"] == 10.0
    assert set(found) > {row["label"] for row in read_report(DOCS / "results" / "live.json").rows[:-1]}


def test_the_figures_of_visitors() -> None:
    log = []
    for number in (0, 1):
        prompt = f"[visitor {number}, question 0] Bread."
        log.append(visitors.Asked(prompt, number, 0.0, began=1.0 + number, ended=5.0, number=number))
    log.append(visitors.Asked("[visitor 1, question 1] Snow.", 2, 0.0, error="TimeoutError"))
    found = figures(visitors.report(2, log, 6.0, [10_000_000, 20_000_000, 30_000_000]))
    assert (found["questions asked"], found["questions answered"], found["errors"]) == (3, 2, 1)
    assert found["pairs served out of order, of 1"] == 0
    assert (found["wait in the queue, median"], found["wait in the queue, longest"]) == (1.5, 2.0)
    assert found["server memory in the middle"] == 20


def test_decode_keeps_the_medians_of_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rates = iter([1.0, 2.0, 3.0, 4.0, 9.0, 8.0, 7.0, 6.0, 5.0, 5.0, 5.0, 5.0])

    real = subprocess.run

    def measured(command: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
        if command[0] == "git":
            return real(command, **options)
        figures = {"tokens_per_second": next(rates), "first_token": 0.25, "memory": 3e8, "libraries": 1e8}
        return subprocess.CompletedProcess(command, 0, json.dumps(figures), "")

    weights, out = tmp_path / "model.safetensors", tmp_path / "found.json"
    weights.write_bytes(bytes(1_500_000))
    monkeypatch.setattr(decode, "check_names", lambda *names: tmp_path)
    monkeypatch.setattr("benchmarks.decode.subprocess.run", measured)
    called(monkeypatch, "decode", "shipped", "--out", str(out))
    found = read_report(out)
    assert [row["tokens_per_second"] for row in found.rows] == [5.0, 5.0, 5.0, 5.0]
    packed = found.rows[-1]
    assert shown("decode-shipped") | {"disk_mb"} == packed.keys()
    assert (packed["first_token_ms"], packed["model_mb"], packed["disk_mb"]) == (250, 200, 1.5)
    assert found.settings["rounds"] == 3
    assert "kind" not in found.settings


def test_the_rows_of_end_to_end() -> None:
    result = end_to_end.Result("reverse KL", Divergence(0.5, 0.6, 20.0, 25.0, 100), True, 12.4)
    (row,) = end_to_end.rows([result])
    assert row.keys() == shown("end_to_end")
    assert (row["variant"], row["perplexity"], row["seconds"]) == ("reverse KL (taken back)", 25.0, 12)


def test_files_of_two_checkpoints_are_compared() -> None:
    same, other = {"a": "1" * 64, "b": "2" * 64}, {"a": "1" * 64, "c": "2" * 64}
    rows = kill_resume.compare_files(same, other)
    assert shown("kill_resume-files") <= rows[0].keys()
    assert [row["equal"] for row in rows] == [True, False, False]
    assert not kill_resume.all_equal(rows)
    assert not kill_resume.all_equal([])
    assert kill_resume.all_equal(kill_resume.compare_files(same, same))


@pytest.mark.parametrize(
    ("name", "words", "message"),
    [
        ("layers", ["--models", "GPT-5"], "--models GPT-5: choose from LLaMA-2-7B"),
        ("kill_resume", ["--preset", "fast"], "fast"),
        ("overlap", ["no/such/folder"], "no/such/folder"),
    ],
)
def test_bad_arguments_are_told_in_one_message(
    name: str, words: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit, match=message):
        called(monkeypatch, name, *words)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("live", ["--turns", "0"]),
        ("visitors", ["--visitors", "none"]),
        ("screenshots", ["--size", "large"]),
        ("screenshots", ["--pages", "compare,chat"]),
        ("quality_outside", ["hqq"]),
    ],
)
def test_bad_usage_is_told_by_the_parser(
    name: str, words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        called(monkeypatch, name, *words)
    assert ended.value.code == 2
    assert f"{name}.py: error: " in capsys.readouterr().err


def test_a_missing_program_is_named() -> None:
    with pytest.raises(SystemExit, match="No such file or directory: 'node'"), one_message():
        raise FileNotFoundError(2, "No such file or directory", "node")
