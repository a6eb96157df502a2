"""The benchmarks take every kind of name, and end with one line where a name leads nowhere."""

from __future__ import annotations

import json
import runpy
import sys
from collections.abc import Iterator

import pytest

from benchmarks import answers, decode, end_to_end, quality
from tests.helpers.named_models import PACKED, TEACHERS, NamedModels, named_models

BAD = ("shiped", "no/such/folder")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NamedModels]:
    with named_models(tmp_path_factory.mktemp("names")) as made:
        yield made


def call(module: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    """Run the benchmark's command in this process."""
    monkeypatch.setattr(sys, "argv", [module, *words])
    {"answers": answers, "decode": decode, "end_to_end": end_to_end, "quality": quality}[module].main()


def test_answers_of_all(
    models: NamedModels, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(answers, "PROMPTS", answers.PROMPTS[:1])
    names = [models.names[kind] for kind in TEACHERS + PACKED]
    call("answers", monkeypatch, *names, "--tokens", "2")
    printed = capsys.readouterr().out
    assert [line for line in printed.splitlines() if line.startswith("*") and line[1] != "*"] == [
        f"*{name}*" for name in names
    ]


@pytest.mark.parametrize("kind", TEACHERS + PACKED)
def test_decode(
    models: NamedModels, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(decode, "TOKENS", 4)
    name = models.names[kind]
    words = ["--kind", "fp32", "shipped", "--teacher", name] if kind in TEACHERS else ["--kind", "packed", name]
    call("decode", monkeypatch, *words)
    assert json.loads(capsys.readouterr().out)["tokens_per_second"] > 0


@pytest.mark.parametrize("kind", TEACHERS + PACKED)
def test_quality(
    models: NamedModels, kind: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = models.names[kind]
    row = {"kind": "teacher", "name": ""} if kind in TEACHERS else {"kind": "checkpoint", "name": name}
    words = ["--texts", models.text, "--window", "32", "--seq-len", "32", "--limit", "1", "--row", json.dumps(row)]
    call("quality", monkeypatch, "--teacher", name if kind in TEACHERS else "smollm2-135m-instruct", *words)
    (found,) = json.loads(capsys.readouterr().out)
    assert models.text in found


@pytest.mark.parametrize(
    "words",
    [
        ("answers", "packed", "NAME"),
        ("decode", "NAME"),
        ("decode", "shipped", "--teacher", "NAME"),
        ("quality", "--methods", "rtn", "--checkpoint", "NAME"),
        ("quality", "--methods", "rtn", "--teacher", "NAME"),
        ("end_to_end", "NAME"),
    ],
)
@pytest.mark.parametrize("name", BAD)
def test_a_bad_name_is_one_line(
    models: NamedModels, words: tuple[str, ...], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(SystemExit) as end:
        call(words[0], monkeypatch, *(name if word == "NAME" else word for word in words[1:]))
    message = str(end.value)
    assert name in message
    assert "\n" not in message


@pytest.mark.parametrize("module", ["round_trip", "space", "throughput"])
def test_a_bad_name_of_the_long_ones(models: NamedModels, module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["--model", "shiped"] if module == "throughput" else ["shiped"]
    monkeypatch.setattr(sys, "argv", [module, *words])
    with pytest.raises(SystemExit, match="model 'shiped' is not known"):
        runpy.run_module(f"benchmarks.{module}", run_name="__main__")
