"""evaluate with several models, prompts and parts, and the commands for stored evaluations."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbllm.evaluation.measure import measure
from lbllm.evaluation.store import EvaluationStore, write_end
from tests.helpers.homes import own_home
from tests.helpers.made_evaluations import MODELS, made
from tests.helpers.spoken import Spoken
from tests.helpers.tiny_models import SENTENCES, save_tiny


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationStore:
    """Evaluations that work at once, in the testing process."""

    def start(self: EvaluationStore, name: str) -> None:
        self.enqueue(name).close()
        found = self.get(name)
        write_end(found.folder, *measure(found))

    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home")))
    monkeypatch.setenv("COLUMNS", "250")
    monkeypatch.setattr(EvaluationStore, "start", start)
    monkeypatch.chdir(tmp_path)
    return EvaluationStore()


def test_two_models_are_measured_and_compared(store: EvaluationStore, say: Spoken, tmp_path: Path) -> None:
    one, two = (str(save_tiny(tmp_path / name, "llama", seed=n)) for n, name in enumerate(("one", "two")))
    (tmp_path / "text.txt").write_text("\n".join(SENTENCES * 6))
    words = ["evaluate", "--model", "one", "--teacher", two, "--text", "text.txt", "--seq-len", "32", "--limit", "6"]
    alone = say(*words, "--json")
    document = say(*words, "--parts", "--json")
    assert document["figures"][one]["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-4)
    assert document["figures"][one]["kl"] == pytest.approx(alone["kl"], rel=1e-4)
    assert document["teacher"] == two
    assert document["differences"][one]["from"] == two
    assert document["differences"][one]["interval"]["low"] < document["differences"][one]["value"]
    assert sum(part["share"] for part in document["by_kind"]) == pytest.approx(1)
    shown = say("evaluations", "show", document["evaluation"])
    assert "kind of token" in shown
    assert "tokens read" in shown
    assert [found["evaluation"] for found in say("evaluations", "list", "--json")["evaluations"]] == [
        document["evaluation"]
    ]
    (tmp_path / "prompts.txt").write_text("Why?\nHow?\n")
    answering = ["evaluate", "--model", "one", "--model", two, "--prompts", "prompts.txt", "--max-tokens", "4"]
    document = say(*answering, "--out", "answers.csv", "--json")
    assert [len(given) for given in document["answers"].values()] == [2, 2]
    assert (tmp_path / "answers.csv").read_text().count("Why?") >= 2
    say("evaluations", "show", document["evaluation"], "--out", "answers.html")
    assert "Why?" in (tmp_path / "answers.html").read_text()


def test_what_can_not_be_measured_is_said_before(store: EvaluationStore, say: Spoken, tmp_path: Path) -> None:
    model = str(save_tiny(tmp_path / "one", "llama"))
    (tmp_path / "big.txt").write_bytes(b"a b\n" * 2_500_000)
    (tmp_path / "empty.txt").write_bytes(b"")
    for words, said in (
        (["--prompts", "big.txt"], "big.txt has 10.0 MB"),
        (["--prompts", "empty.txt"], "empty.txt is empty"),
        (["--prompts", "none.txt"], "--prompts none.txt can't be read"),
        (["--model", "nowhere/at/all", "--parts"], "folder nowhere/at/all does not exist"),
        (["--tasks", "pica", "--seed", "1"], "task 'pica' is not known"),
        (["--parts", "--text", "none.txt"], "none.txt"),
        (["--parts", "--device", "cpu"], "--device is for one model alone"),
        (["--parts", "--out", "a.csv"], "--out writes the answers of --prompts"),
    ):
        assert said in say("evaluate", "--model", model, *words, code=1)
    assert store.all() == []
    (tmp_path / "short.txt").write_text("Short.")
    said = say("evaluate", "--model", model, "--text", "short.txt", "--parts", code=1)
    assert "short.txt has 5 tokens, one window needs 256" in said


def test_stored_evaluations_are_listed_shown_and_deleted(store: EvaluationStore, say: Spoken) -> None:
    assert "no evaluations yet" in say("evaluations", "list")
    tasks = made(store, "tasks", tasks=("piqa",))
    prompts = made(store, "prompts", prompts=("Why?",), message="one was left out")
    shown = say("evaluations", "list")
    assert tasks.id in shown
    assert "<b>third</b>" in shown
    assert "only this one is right" in say("evaluations", "show", tasks.id)
    document = say("evaluations", "show", tasks.id, "--json")
    assert document["figures"][MODELS[1]]["average"]["accuracy"] == 0.5
    first = document["only_one_right"][MODELS[1]][0]
    assert (first["task"], first["number"], first["winner"]) == ("piqa", 1, MODELS[0])
    assert first["question"] == {"text": "Question 1 of piqa?", "choices": ["yes <i>", "no"], "right": 1}
    assert first["chosen"][MODELS[1]] == 0
    assert "one was left out" in say("evaluations", "show", prompts.id)
    assert "only one that waits or works" in say("evaluations", "cancel", tasks.id, code=1)
    say("evaluations", "delete", tasks.id)
    assert "no evaluation" in say("evaluations", "show", tasks.id, code=1)
