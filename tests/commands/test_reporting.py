"""The command report: it measures what is missing, takes what is known, and refuses early what it can't do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lbllm.evaluation.measure import measure
from lbllm.evaluation.store import EvaluationStore, write_end
from lbllm.runs.store import Run, RunStore
from tests.helpers.finished_run import finished_run
from tests.helpers.homes import own_home
from tests.helpers.spoken import Spoken
from tests.helpers.tiny_models import SENTENCES


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """A finished run; evaluations work at once, in the testing process."""

    def start(self: EvaluationStore, name: str) -> None:
        self.enqueue(name).close()
        found = self.get(name)
        write_end(found.folder, *measure(found))

    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    monkeypatch.setattr(EvaluationStore, "start", start)
    monkeypatch.setattr("lbllm.reporting.evaluations.ANSWER_TOKENS", 6)
    monkeypatch.chdir(tmp_path)
    store = RunStore()
    yield finished_run(store, tmp_path, ("ptq",))
    store.close()


def test_a_report_measures_what_is_missing_once(run: Run, say: Spoken, tmp_path: Path) -> None:
    (tmp_path / "read.txt").write_text("\n".join(f"{n} {line}" for n in range(12) for line in SENTENCES))
    (tmp_path / "prompts.txt").write_text("Why?\nHow?\n")
    words = ["report", run.id, "--text", "read.txt", "--seq-len", "32", "--limit", "6"]
    assert "are not measured; leave out --no-measure" in say(*words, "--no-measure")
    assert "Perplexity and KL are not measured yet" in (tmp_path / "report-tiny-one.html").read_text()
    document = say(*words, "--prompts", "prompts.txt", "--out", "mine.html", "--json")
    assert len(document["evaluations"]) == 2
    assert document["problems"] == []
    page = (tmp_path / "mine.html").read_bytes()
    assert document["bytes"] == len(page)
    assert b"Round to nearest, W2A16" in page
    assert b"Why?" in page
    # All of it is known now, also by the run's folder, and to the page Evaluate.
    again = say("report", str(run.folder), "--no-measure", "--out", "mine.html", "--json")
    assert (again["evaluations"], again["problems"]) == ([], [])
    assert len(EvaluationStore().all()) == 2


def test_what_can_not_be_reported_is_said_before(run: Run, say: Spoken, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_bytes(b"")
    for words, said in (
        (["nowhere"], "model 'nowhere' is not known"),
        ([run.config.model], "is not a packed checkpoint"),
        ([run.id, "--out", "a.pdf"], "give a name that ends in .html"),
        ([run.id, "--out", "none/a.html"], "none does not exist; make it first"),
        ([run.id, "--prompts", "empty.txt"], "empty.txt is empty"),
        ([run.id, "--text", "none.txt"], "none.txt' is not a file"),
    ):
        assert said in say("report", *words, code=1)
    assert EvaluationStore().all() == []
    assert list(tmp_path.glob("*.html")) == []
