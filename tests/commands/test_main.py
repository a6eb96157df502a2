"""The command line: documents on stdout, messages on stderr, exit codes."""

from __future__ import annotations

import gzip
import io
import json
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from lbllm.chat.settings import ChatSettings
from lbllm.commands.main import build, main
from lbllm.config import OPTIONS, SETTINGS
from lbllm.measure.perplexity import perplexity
from lbllm.places import ASSETS
from lbllm.texts.windows import evaluation_tokens
from tests.helpers import ROOT
from tests.helpers.homes import own_home
from tests.helpers.tiny_models import SENTENCES, save_tiny, tiny


@dataclass
class Result:
    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)


class Terminal:
    """Runs the command line in this process, with a run store and models of its own."""

    def __init__(self, capsys: pytest.CaptureFixture[str], folder: Path) -> None:
        self.capsys = capsys
        self.model = str(save_tiny(folder / "teacher", "llama"))
        self.text = str(folder / "text.txt")
        Path(self.text).write_text("\n".join(f"{index}. {line}" for index in range(60) for line in SENTENCES))

    def __call__(self, *arguments: str) -> Result:
        self.capsys.readouterr()
        code = main(arguments)
        captured = self.capsys.readouterr()
        assert "Traceback" not in captured.err
        return Result(code, captured.out, captured.err)


@pytest.fixture
def terminal(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Terminal:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    monkeypatch.delenv("LBLLM_DATA_DIR", raising=False)
    return Terminal(capsys, tmp_path)


def test_help_does_not_wait_for_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "lbllm", "quantize", "--help"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "--group-size" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert "lbllm.commands.main" in imported
    assert "torch" not in imported


@pytest.mark.parametrize(
    "arguments",
    [
        ["quantise"],
        ["quantize", "--model", "x"],
        ["evaluate", "--model", "x", "--seq-len", "1"],
        ["runs", "show"],
        ["chat", "--model", "x", "--json"],
        ["chat", "-m", "x", "-m", "y", "-m", "z", "--prompt", "a"],
        ["chat", "--model", "x", "--prompt", " "],
    ],
)
def test_bad_usage_is_exit_code_2(terminal: Terminal, arguments: list[str]) -> None:
    assert terminal(*arguments).code == 2
    result = terminal(*arguments, "--json")
    assert result.code == 2
    assert result.document["error"]
    assert result.document["error"] in result.err


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--model", "no-such-model"],
        ["chat", "--model", "no-such-model", "--prompt", "x"],
        ["estimate", "--model", "no-such-model"],
        ["quantize", "--model", "no-such-model", "--out", "OUT"],
        ["estimate", "--preset", "no-such-preset"],
        ["estimate", "--set", "wat.no_such_key=1"],
        ["estimate", "--set", "no-equals-sign"],
        ["estimate", "--group-size", "0"],
        ["estimate", "--format", "w9"],
        ["estimate", "--act-bits", "5"],
        ["runs", "show", "no-such-run"],
        ["runs", "resume", "no-such-run"],
        ["runs", "cancel", "no-such-run"],
        ["table", "no-such-run"],
        ["evaluate", "--model", "smollm2-135m-instruct", "--device", "no-such-device"],
    ],
)
def test_bad_values_are_named(terminal: Terminal, tmp_path: Path, arguments: list[str]) -> None:
    arguments = [str(tmp_path / "out") if argument == "OUT" else argument for argument in arguments]
    result = terminal(*arguments, "--json")
    assert result.code == 1
    message = result.document["error"]
    value = arguments[arguments.index("--out") - 1] if "--out" in arguments else arguments[-1]
    value = value if value != "x" else "no-such-model"
    assert value.split("=")[0].split(".")[-1] in message
    assert message in result.err
    plain = terminal(*arguments)
    assert (plain.code, plain.out) == (1, "")
    assert message in plain.err


def test_settings_files(terminal: Terminal, tmp_path: Path) -> None:
    file = tmp_path / "settings.json"
    many = [{"quant": {"overrides": {f"*.{k}": {"group_size": 16} for k in range(n)}}} for n in (100_000, 2_000)]
    for content, complaint in [
        ("{", "not valid JSON"),
        ("[1]", "list"),
        ('{"wat": {"epoch": 2}}', "wat.epoch"),
        ('{"preset": [], "wat": {"epoch": 2}}', "wat.epoch"),
        ('{"a":' * 900 + "1" + "}" * 900, "nested more than 8 levels"),
        (json.dumps(many[0]), "more than 1 MB"),
        (json.dumps(many[1]), "at most 1,000"),
    ]:
        file.write_text(content)
        result = terminal("estimate", "--config", str(file))
        assert result.code == 1
        assert complaint in result.err
    missing = terminal("estimate", "--config", str(tmp_path / "missing.json"))
    assert missing.code == 1
    assert "missing.json" in missing.err


def test_evaluate(terminal: Terminal) -> None:
    model, tokenizer = tiny("llama")
    sequences = evaluation_tokens(terminal.text, tokenizer, seq_len=64, limit=5)
    expected = perplexity(model, sequences)
    options = ["--model", terminal.model, "--text", terminal.text, "--seq-len", "64", "--limit", "5"]
    document = terminal("evaluate", *options, "--json").document
    assert document["perplexity"] == pytest.approx(expected.perplexity)
    assert document["tokens"] == expected.tokens == 5 * 63
    assert document["windows"] == 5
    assert f"{expected.perplexity:.2f}" in terminal("evaluate", *options).out


def test_evaluate_takes_the_models_context_where_it_is_short(terminal: Terminal) -> None:
    options = ["--model", terminal.model, "--text", terminal.text, "--limit", "2", "--json"]
    assert terminal("evaluate", *options).document["seq_len"] == 256
    longer = terminal("evaluate", *options, "--seq-len", "300")
    assert longer.code == 1
    assert "256" in longer.document["error"]


def test_evaluate_against_a_teacher(terminal: Terminal, tmp_path: Path) -> None:
    other = str(save_tiny(tmp_path / "other", "llama", seed=1))
    options = ["--text", terminal.text, "--seq-len", "64", "--limit", "2", "--teacher", terminal.model, "--json"]
    same = terminal("evaluate", "--model", terminal.model, *options).document
    assert (same["kl"], same["top1_agreement"]) == (0, 1)
    assert same["perplexity"] == same["teacher_perplexity"]
    assert terminal("evaluate", "--model", other, *options).document["kl"] > 0


@pytest.mark.parametrize("against", [False, True])
def test_a_model_whose_results_are_no_numbers_is_no_success(terminal: Terminal, tmp_path: Path, against: bool) -> None:
    model, tokenizer = tiny("llama")
    model.get_output_embeddings().weight.data[3, 0] = float("nan")
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path / "broken")
    options = ["--teacher", terminal.model] if against else []
    broken = ["evaluate", "--model", str(tmp_path / "broken"), "--text", terminal.text, "--limit", "2", *options]
    result = terminal(*broken, "--json")
    assert result.code == 1
    assert "perplexity" in result.document["error"]
    assert str(tmp_path / "broken") in result.document["error"]


def test_evaluate_on_too_short_or_missing_text(terminal: Terminal, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Only this.")
    for name in (str(short), str(tmp_path / "missing.txt")):
        result = terminal("evaluate", "--model", terminal.model, "--text", name, "--json")
        assert result.code == 1
        assert name in result.document["error"]


def test_evaluate_refuses_what_training_refuses_and_counts_rows_without_text(
    terminal: Terminal, tmp_path: Path
) -> None:
    for name in ("a.json", "a.csv", "a.parquet"):
        (tmp_path / name).write_text(Path(terminal.text).read_text())
        result = terminal("evaluate", "--model", terminal.model, "--text", str(tmp_path / name), "--seq-len", "32")
        assert result.code == 1
        assert f"can't read text from a {Path(name).suffix} file" in result.err
    rows = [{"text": line} for line in SENTENCES * 3] + [{"text": None}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    arguments = (
        "evaluate",
        "--model",
        terminal.model,
        "--text",
        str(tmp_path / "a.jsonl"),
        "--seq-len",
        "32",
        "--json",
    )
    result = terminal(*arguments)
    assert result.code == 0
    assert result.document["windows"] > 2
    assert "1 row without text was left out" in result.err


def test_chat_one_shot(terminal: Terminal) -> None:
    options = ["--prompt", "What is the capital of France?", "--max-new-tokens", "8", "--temperature", "0"]
    document = terminal("chat", "--model", terminal.model, *options, "--json").document
    (answer,) = document["answers"]
    assert answer["model"] == terminal.model
    assert answer["tokens"] <= 8
    assert answer["first_token_seconds"] > 0
    assert answer["answer"] in terminal("chat", "--model", terminal.model, *options).out


def test_a_chat_has_one_temperature_on_the_command_line_and_on_pages() -> None:
    chat = typer.main.get_command(build()).commands["chat"]  # type: ignore[attr-defined]
    defaults = {parameter.name: parameter.default for parameter in chat.params}
    usual = ChatSettings()
    for name in ("temperature", "top_p", "repetition_penalty", "seed"):
        assert defaults[name] == getattr(usual, name)
    assert usual.temperature == 0.2


@pytest.mark.parametrize("path", OPTIONS)
def test_an_option_that_sets_a_setting_has_its_help(path: str) -> None:
    commands = typer.main.get_command(build()).commands  # type: ignore[attr-defined]
    for command in ("quantize", "estimate"):
        (option,) = (one for one in commands[command].params if OPTIONS[path] in one.opts)
        assert option.help.startswith(SETTINGS[path].description)


def test_bad_values_are_named_as_on_the_page_too(terminal: Terminal) -> None:
    error = terminal("estimate", "--model", terminal.model, "--group-size", "0", "--set", "wat.epochs=0", "--json")
    assert "--group-size: a group has at least one member" in error.document["error"]
    assert "wat.epochs (Stage 2, epochs): Input should be greater than or equal to 1" in error.document["error"]


def test_chat_with_two_models(terminal: Terminal, tmp_path: Path) -> None:
    other = str(save_tiny(tmp_path / "other", "gpt2"))
    options = ["-p", "Hello", "--max-new-tokens", "4", "--temperature", "1", "--seed", "3", "--json"]
    document = terminal("chat", "-m", terminal.model, "-m", other, *options).document
    assert [answer["model"] for answer in document["answers"]] == [terminal.model, other]
    assert (
        terminal("chat", "-m", terminal.model, "-m", other, *options).document["answers"][1]["answer"]
        == (document["answers"][1]["answer"])
    )


def test_conversation(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is the capital of France?\nAnd of Italy?\n"))
    result = terminal("chat", "--model", terminal.model, "--max-new-tokens", "4")
    assert result.code == 0
    assert result.out.count("a second") == 2


def test_catalogues(terminal: Terminal) -> None:
    models = terminal("models", "--json").document["models"]
    assert {"id", "hub_id", "licence", "parameters"} <= models[0].keys()
    corpora = terminal("corpora", "--json").document["corpora"]
    assert "embedded" in [entry["id"] for entry in corpora]
    assert "smollm2-135m-instruct" in terminal("models").out
    assert "wikitext2" in terminal("corpora").out


def test_sampling_a_corpus(terminal: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "new" / "corpus.jsonl.gz"
    options = ["--tokens", "256", "--length", "64", "--batch", "2", "--out", str(out), "--json"]
    document = terminal("corpora", "sample", "--model", terminal.model, *options).document
    assert document["tokens"] == 256
    assert out.stat().st_size == document["bytes"]
    longer = terminal("corpora", "sample", "--model", terminal.model, "--length", "300", "--out", str(out), "--json")
    assert longer.code == 1
    assert "--length 300 is more than the model's context of 256 tokens" in longer.document["error"]


def test_sampling_answers_to_own_questions(terminal: Terminal, tmp_path: Path) -> None:
    questions, out = tmp_path / "questions.txt", tmp_path / "answers.jsonl.gz"
    questions.write_text("How do I mend a torn sleeve?\n\n  What grows in the shade?  \n")
    sampling = ("corpora", "sample", "--model", terminal.model, "--length", "64", "--batch", "4", "--out", str(out))
    assert terminal(*sampling, "--tokens", "512", "--questions", str(questions)).code == 0
    rows = [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()]
    assert [row["kind"] for row in rows] == ["chat"] * 8
    asked = [next(line for line in questions.read_text().split("\n") if line.strip() in row["text"]) for row in rows]
    assert len(set(asked)) == 2
    questions.write_text("\n")
    none = terminal(*sampling, "--questions", str(questions), "--json")
    assert (none.code, none.document["error"]) == (
        1,
        f"{questions} has no questions; give a text file with one per line",
    )


def test_no_runs_yet(terminal: Terminal) -> None:
    assert terminal("runs", "list", "--json").document == {"runs": []}
    assert "no runs yet" in terminal("runs", "list").out


# ------------------------------------------------------------------------------------------------ whole runs

TINY = [
    *("--preset", "preview", "--set", 'stages=["ptq","wat","aar"]', "--group-size", "16"),
    *("--set", "quant.param_bits=16", "--set", "quant.act_group_size=-1", "--set", "wat.lr_weight=2e-2"),
    *("--set", "seq_len=32", "--set", "ptq.tokens=256"),
    *("--set", "wat.tokens=256", "--set", "wat.batch_tokens=64", "--set", "aar.tokens=256"),
    *("--set", "aar.batch_tokens=64", "--set", "aar.search_tokens=128", "--device", "cpu"),
]


def quantize(terminal: Terminal, out: Path, *more: str) -> Result:
    return terminal(
        "quantize", "--model", terminal.model, "--corpus", terminal.text, "--out", str(out), *TINY, "--json", *more
    )


def test_a_run_from_start_to_chat_and_again_from_its_settings(terminal: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "new" / "out"
    done = quantize(terminal, out)
    assert done.code == 0, done.err
    assert done.err == ""
    run = done.document["run"]
    assert done.document["path"] == str(out)
    weights = (out / "model.safetensors").stat().st_size
    assert done.document["disk_bytes"] == weights

    options = ["--model", terminal.model, "--corpus", terminal.text, *TINY]
    estimate = terminal("estimate", *options, "--json").document
    assert estimate["bpw"] == done.document["bpw"]
    assert estimate["disk_bytes"] == pytest.approx(weights, rel=0.01)
    assert {"memory_bytes", "memory_parts", "needs", "seconds"} <= estimate.keys()
    assert estimate["memory_bytes"] == sum(estimate["needs"]["memory"].values())
    assert f"{estimate['bpw']:.3f}" in terminal("estimate", *options).out

    shown = terminal("runs", "show", run, "--json").document
    assert (shown["state"], shown["config"]["quant"]["group_size"]) == ("done", 16)
    assert terminal("runs", "list", "--json").document["runs"][0]["id"] == run
    assert run in terminal("runs", "list").out
    assert "Stage 3" in terminal("runs", "show", run).out

    windows = ["--text", terminal.text, "--seq-len", "64", "--limit", "3"]
    table = terminal("table", run, *windows, "--json").document
    assert [row["what"] for row in table["rows"]] == ["teacher", "rtn", "ptq", "wat", "aar"]
    measured = terminal("evaluate", "--model", str(out), "--teacher", terminal.model, *windows, "--json").document
    assert measured["perplexity"] == pytest.approx(table["rows"][-1]["perplexity"], rel=1e-3)
    assert measured["teacher_perplexity"] == pytest.approx(table["rows"][0]["perplexity"])
    assert measured["kl"] == pytest.approx(table["rows"][-1]["kl"], rel=1e-2)
    assert len(terminal("runs", "show", run, "--json").document["evaluated"]) == 5
    assert "Round to nearest, W2A16" in terminal("table", run, *windows).out

    chat = terminal("chat", "-m", terminal.model, "-m", str(out), "-p", "Hello", "--max-new-tokens", "4", "--json")
    assert len(chat.document["answers"]) == 2

    again = quantize(terminal, out)
    assert again.code == 1
    assert str(out) in again.document["error"]
    ended = terminal("runs", "resume", run, "--json")
    assert ended.code == 1
    assert "done" in ended.document["error"]
    packed = quantize(terminal, tmp_path / "twice", "--model", str(out))
    assert packed.code == 1
    assert "already quantized" in packed.document["error"]

    file = tmp_path / "settings.json"
    file.write_text(json.dumps(shown["config"]))
    result = terminal("quantize", "--config", str(file), "--out", str(tmp_path / "second"), "--set", "seed=0")
    assert result.code == 0
    assert "block 2/2" in result.err
    assert "is done" in result.out
    for name in ("model.safetensors", "config.json"):
        assert (out / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


@pytest.mark.skipif(not (ASSETS / "corpus.jsonl.gz").exists(), reason="the embedded corpus is not made yet")
def test_demo_and_its_repetition(terminal: Terminal, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    wikitext = tmp_path / "data" / "wikitext-2-raw"
    wikitext.mkdir(parents=True)
    (wikitext / "wiki.test.raw").write_text(Path(terminal.text).read_text())
    monkeypatch.setenv("LBLLM_DATA_DIR", str(tmp_path / "data"))
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    wider = str(save_tiny(tmp_path / "wider", "llama", **sizes))
    options = ["demo", "--model", wider, "--preset", "preview", "--out", str(tmp_path / "out"), "--limit", "1"]
    first = terminal(*options)
    assert first.code == 0, first.err
    for part in ("is done", "Stage 2", "wikitext2, 1 windows", wider, str(tmp_path / "out")):
        assert part in first.out
    second = terminal(*options)
    assert "exists already" in second.err
    assert "Stage 2" in second.out


def test_bad_settings_are_refused_before_a_run_is_made(terminal: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "out"
    too_large = quantize(terminal, out, "--group-size", "1000")
    too_much = quantize(terminal, out, "--set", "wat.batch_tokens=1000000000000")
    for result, value in ((too_large, "1000"), (too_much, "--ignore-memory")):
        assert result.code == 1
        assert value in result.document["error"]
    assert terminal("runs", "list", "--json").document == {"runs": []}
    assert not out.exists()


def test_a_run_whose_text_is_too_short_fails_with_a_reason(terminal: Terminal, tmp_path: Path) -> None:
    Path(terminal.text).write_text("Only this.")
    result = quantize(terminal, tmp_path / "out")
    assert result.code == 1
    assert terminal.text in result.document["error"]
    assert "runs resume" in result.document["error"]
    (run,) = terminal("runs", "list", "--json").document["runs"]
    assert run["state"] == "failed"


@pytest.mark.soak
def test_a_run_says_that_it_waits_for_another_and_then_ends(terminal: Terminal, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lbllm", "quantize", "--model", terminal.model, "--corpus", terminal.text, *TINY]
    first, second = (
        [*command, "--set", f"wat.epochs={epochs}", "--out", str(tmp_path / name)]
        for name, epochs in (("one", 5_000), ("two", 1))
    )
    with subprocess.Popen(first, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as working:
        assert working.stderr is not None
        assert any(line.startswith("Stage 2") for line in working.stderr)
        (run,) = terminal("runs", "list", "--json").document["runs"]
        with subprocess.Popen(second, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as waiting:
            assert waiting.stderr is not None
            assert any(f"run {run['id']} is at work" in line for line in waiting.stderr)
            working.send_signal(signal.SIGINT)
            working.communicate(timeout=180)
            waiting.communicate(timeout=180)
            assert waiting.returncode == 0
    assert (tmp_path / "two" / "model.safetensors").is_file()


def test_ctrl_c_stops_and_resume_goes_on(terminal: Terminal, tmp_path: Path) -> None:
    out = tmp_path / "out"
    command = [sys.executable, "-m", "lbllm", "quantize", "--model", terminal.model, "--corpus", terminal.text]
    command += ["--out", str(out), *TINY, "--set", "wat.epochs=20"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("Stage 2"):
            process.send_signal(signal.SIGINT)
            break
    output, errors = process.communicate(timeout=180)
    assert (process.returncode, output) == (130, "")
    assert "runs resume" in errors
    (run,) = terminal("runs", "list", "--json").document["runs"]
    assert run["state"] == "stopped"
    assert not out.exists()
    resumed = terminal("runs", "resume", run["id"], "--out", str(out))
    assert resumed.code == 0, resumed.err
    assert "finished blocks taken over" in resumed.err
    assert (out / "model.safetensors").is_file()
    assert terminal("runs", "cancel", run["id"], "--json").code == 1
