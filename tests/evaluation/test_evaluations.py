"""Evaluations of tiny models: figures against float64 by hand, what is refused, and where a later worker goes on."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

from lbllm.checkpoints.find import open_model
from lbllm.errors import CheckpointError, CorpusError, LbllmError, ModelError, RunError
from lbllm.evaluation.job import EvaluationJob, make_job
from lbllm.evaluation.measure import measure
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.results import (
    answers_results,
    by_kind,
    by_position,
    disputed,
    kl_difference,
    task_difference,
    task_results,
    text_difference,
    text_results,
)
from lbllm.evaluation.store import Evaluation, EvaluationStore, Progress, write_end
from lbllm.measure.perplexity import divergence, token_losses
from lbllm.measure.zero_shot import zero_shot
from lbllm.sections import QuantConfig
from lbllm.texts.windows import evaluation_windows
from tests.helpers.homes import own_home
from tests.helpers.tiny_models import SENTENCES, save_tiny
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.measure.test_zero_shot import data  # noqa: F401

WINDOW = 32


class Models:
    """A teacher, its packed student, a dense model of another shape, and one with another tokenizer, in a folder."""

    def __init__(self, folder: Path) -> None:
        packed, teacher = tiny_checkpoint(folder, "llama", QuantConfig(group_size=16, act_group_size=16))
        self.teacher, self.packed = str(teacher), str(packed)
        self.other = str(save_tiny(folder / "other", "llama", num_hidden_layers=1))
        self.foreign = str(save_tiny(folder / "foreign", "llama"))
        file = Path(self.foreign) / "tokenizer.json"
        document = json.loads(file.read_text())
        ids = document["model"]["vocab"]
        names = [next(name for name, number in ids.items() if number == n) for n in (40, 41)]
        ids[names[0]], ids[names[1]] = 41, 40
        file.write_text(json.dumps(document))
        self.text = str(folder / "text.txt")
        Path(self.text).write_text("\n".join(f"{n} {line}" for n in range(12) for line in SENTENCES))


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EvaluationStore:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    return EvaluationStore()


def text_job(models: Models, *names: str, teacher: str | None = None, **changes: Any) -> EvaluationJob:
    base = {"measure": "text", "models": names, "teacher": teacher, "text": models.text, "seq_len": WINDOW}
    return make_job(**base | {"windows": 6} | changes)


def work(store: EvaluationStore, job: EvaluationJob) -> tuple[Evaluation, Parts]:
    """Measure a job in this process, as its worker would."""
    made = store.create(job)
    write_end(made.folder, *measure(made))
    return store.get(made.id), Parts(made.folder)


def test_perplexity_kl_and_their_parts_are_those_of_the_models(store: EvaluationStore, models: Models) -> None:
    job = text_job(models, models.packed, models.teacher, models.other, teacher=models.teacher)
    done, parts = work(store, job)
    assert (done.state, done.message) == ("done", "")
    found = text_results(job, parts)
    teacher, tokenizer = open_model(models.teacher)
    windows = evaluation_windows(models.text, teacher, tokenizer, WINDOW, 6)
    for number, name in ((0, models.packed), (2, models.other)):
        student, _ = open_model(name)
        wanted = divergence(teacher, student, windows)
        assert found[number].perplexity == pytest.approx(wanted.student_perplexity, rel=1e-4)
        assert found[number].kl == pytest.approx(wanted.kl, rel=1e-4)
        assert found[number].agreement == pytest.approx(wanted.top1_agreement)
        assert found[1].perplexity == pytest.approx(wanted.teacher_perplexity, rel=1e-4)
        assert found[number].tokens == wanted.tokens
    assert (found[1].kl, found[1].agreement) == (0, 1)
    # By hand, in float64: losses of the teacher, their parts, and the paired difference.
    with torch.no_grad():
        logits = teacher(windows).logits[:, :-1].double().log_softmax(-1)
    nll = -logits.gather(-1, windows[:, 1:, None])[..., 0]
    sizes = sum(len(str(tokenizer.decode(window[1:])).encode()) for window in windows.tolist())
    assert found[1].bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / sizes, rel=1e-3)
    places = by_position(job, parts)
    assert [part.label for part in places] == ["1–3", "4–15", "16–31"]
    assert places[1].perplexity[1] == pytest.approx(float(nll[:, 3:15].mean().exp()), rel=1e-4)
    kinds = by_kind(job, parts)
    assert sum(part.share for part in kinds) == pytest.approx(1)
    assert sum(part.share * math.log(part.perplexity[1]) for part in kinds) == pytest.approx(
        float(nll.mean()), rel=1e-4
    )
    assert {"word start", "inside a word", "number", "punctuation"} <= {part.label for part in kinds}
    apart = text_difference(job, parts, 0, 1)
    assert apart is not None
    assert apart.interval is not None
    assert apart.value == pytest.approx(found[0].perplexity - found[1].perplexity)
    assert apart.interval.low < apart.value < apart.interval.high
    by_kl = kl_difference(job, parts, 0, 2)
    assert by_kl is not None
    assert by_kl.value == pytest.approx((found[0].kl or 0) - (found[2].kl or 0))


def test_tokenizers_are_told_apart(store: EvaluationStore, models: Models) -> None:
    job = text_job(models, models.teacher, models.packed, models.foreign, teacher=models.teacher)
    done, parts = work(store, job)
    assert done.state == "done"
    found = text_results(job, parts)
    assert found[1].kl is not None
    assert found[2].kl is None
    assert found[2].bits_per_byte > 0
    opened = parts.opened(2)
    assert opened is not None
    assert "no KL, and only bits per byte" in opened.caution
    assert text_difference(job, parts, 2, 0) is None
    assert kl_difference(job, parts, 2, 1) is None
    assert by_kind(job, parts)[0].perplexity.keys() == {0, 1}


def test_a_killed_evaluation_goes_on_where_it_was(
    store: EvaluationStore, models: Models, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lbllm.evaluation import text_work

    job = text_job(models, models.packed, models.teacher, teacher=models.teacher, windows=5)
    monkeypatch.setattr(text_work, "windows_at_once", lambda windows: 2)
    whole, wanted = work(store, job)
    calls: list[int] = []

    def failing(*given: Any) -> Any:
        calls.append(len(given[1]))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return token_losses(*given)

    made = store.create(job)
    monkeypatch.setattr(text_work, "token_losses", failing)
    with pytest.raises(KeyboardInterrupt):
        measure(made)
    assert store.get(made.id).state == "interrupted"
    parts = Parts(made.folder)
    # As if it had been killed while it wrote.
    with (made.folder / "losses-1.f32").open("ab") as file:
        file.write(b"half a window")
    calls[:] = [0] * 4
    store.enqueue(made.id).close()
    assert measure(store.get(made.id)) == ("done", "")
    # The teacher's second pair was done: it is read once more, for the student's KL.
    assert calls[4:] == [2, 2, 1, 1]
    for number in (0, 1):
        for name in ("nll", "kl", "agreed"):
            given = getattr(parts.losses(number, WINDOW - 1), name)
            assert numpy.array_equal(given, getattr(wanted.losses(number, WINDOW - 1), name))
    assert store.get(whole.id).state == "done"


def test_a_model_or_text_that_changed_is_not_mixed_with_finished_parts(
    store: EvaluationStore, models: Models, tmp_path: Path
) -> None:
    copy, text = tmp_path / "copy", tmp_path / "text.txt"
    shutil.copytree(models.other, copy)
    shutil.copy(models.text, text)
    job = text_job(models, str(copy), models.teacher, text=str(text))
    done, _ = work(store, job)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    state, message = measure(done)
    assert (state, message) == (
        "done",
        f"{copy} was left out: its files have changed since this evaluation began; start a new evaluation",
    )
    text.write_text("New. " + text.read_text())
    with pytest.raises(ModelError, match="the text has changed since this evaluation began"):
        measure(done)


def test_what_is_missing_is_said_and_the_rest_goes_on(store: EvaluationStore, models: Models, tmp_path: Path) -> None:
    gone = tmp_path / "gone"
    shutil.copytree(models.packed, gone)
    job = text_job(models, str(gone), models.teacher)
    shutil.rmtree(gone)
    done, parts = work(store, job)
    assert done.state == "done"
    assert f"{gone} was left out: folder {gone} does not exist" in done.message
    assert done.can_continue
    assert text_results(job, parts).keys() == {1}
    with pytest.raises(ModelError, match=r"no model can be measured: .* does not exist"):
        measure(store.create(text_job(models, str(gone))))
    with pytest.raises(CorpusError, match="is not a file; give a file or wikitext2"):
        measure(store.create(text_job(models, models.teacher, text=str(gone / "a.txt"))))
    with pytest.raises(CorpusError, match="one window needs 250"):
        measure(store.create(text_job(models, models.teacher, text=_short(tmp_path), seq_len=250)))


def _short(folder: Path) -> str:
    (folder / "short.txt").write_text("Too short.")
    return str(folder / "short.txt")


def test_tasks_are_those_of_lm_eval_question_by_question(
    store: EvaluationStore,
    models: Models,
    data: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tasks = ("piqa", "winogrande", "openbookqa")
    job = make_job(
        measure="tasks", models=(models.packed, models.teacher), teacher=models.teacher, tasks=tasks, questions=6
    )
    (data / "tasks" / "openbookqa_test.jsonl.gz").unlink()
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done, parts = work(store, job)
    assert "Task openbookqa was left out: task openbookqa: " in done.message
    assert "LBLLM_DATA_DIR" in done.message
    found = task_results(job, parts)
    for number, name in enumerate((models.packed, models.teacher)):
        scores = {score.task: score for score in zero_shot(*open_model(name), tasks[:2], limit=6)}
        assert {task: found[number][task].accuracy for task in scores} == pytest.approx(
            {task: score.accuracy for task, score in scores.items()}
        )
        assert found[number][""].accuracy == pytest.approx(numpy.mean([s.accuracy for s in scores.values()]))
        assert found[number]["piqa"].questions == 6
    only = disputed(job, parts, 0, 1)
    for one in only:
        assert (one.question.right == one.chosen[0]) != (one.question.right == one.chosen[1])
        assert one.chosen[one.winner] == one.question.right
        assert one.question.text
        assert one.question.choices[one.chosen[0]]
    apart = task_difference(job, parts, 0, 1)
    assert apart is not None
    assert apart.count == 12
    assert apart.value == pytest.approx(found[0][""].accuracy - found[1][""].accuracy)
    # Of the questions that one gets right and the other not, the share in each task is the difference.
    won = [sum(1 if one.winner == 0 else -1 for one in only if one.task == task) / 6 for task in tasks[:2]]
    assert apart.value == pytest.approx(sum(won) / 2)


def test_prompts_are_answered_side_by_side(store: EvaluationStore, models: Models) -> None:
    prompts = ("What is bread?", "x" * 600, "Who counted the stars?")
    job = make_job(
        measure="prompts",
        models=(models.packed, models.teacher, models.foreign),
        teacher=models.teacher,
        prompts=prompts,
        settings={"max_new_tokens": 8, "temperature": 0},
    )
    done, parts = work(store, job)
    assert done.state == "done"
    answers = [parts.answers(number) for number in range(3)]
    assert [len(given) for given in answers] == [3, 3, 3]
    for given in answers:
        assert given[1].error.startswith("the conversation has ")
        assert not given[0].error
        assert 1 <= given[0].tokens <= 8
    assert answers[0][0].kl is not None
    assert answers[1][0].kl is None
    assert answers[2][0].kl is None
    parts.vote(0, 1)
    parts.vote(2, -1)
    found = answers_results(job, parts)
    assert (found[0].answers, found[0].errors, found[0].best, found[1].best) == (3, 1, 0, 1)
    parts.vote(0, None)
    assert parts.votes() == {2: -1}
    # What is answered is not asked again, and a line that was cut off is.
    file = done.folder / "answers-2.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:2]) + lines[2][:9])
    assert measure(done)[0] == "done"
    assert [answer.text for answer in parts.answers(2)] == [answer.text for answer in answers[2]]


def test_the_time_left_follows_the_pace_of_this_worker() -> None:
    progress = Progress("", 3, 10, 1, started=100.0)
    assert progress.seconds_left(108.0) == 28.0
    assert progress.share == 0.3
    assert Progress("", 1, 10, 1, started=100.0).seconds_left(108.0) is None
    assert Progress("", 0, 0, 0, started=100.0).share == 0


def test_a_store_lists_cancels_and_deletes(store: EvaluationStore, models: Models) -> None:
    assert store.all() == []
    one, two = (store.create(text_job(models, models.teacher, windows=n)) for n in (1, 2))
    assert [found.id for found in store.all()] == [found.id for found in sorted((one, two), key=lambda e: e.id)]
    assert store.get(one.id).state == "interrupted"
    with pytest.raises(RunError, match="only one that waits or works can be cancelled"):
        store.cancel(one.id)
    with store.enqueue(one.id):
        assert store.get(one.id).state == "queued"
        with pytest.raises(RunError, match="is at work or waits for its turn"):
            store.enqueue(one.id)
        with pytest.raises(RunError, match="is at work; cancel it first"):
            store.delete(one.id)
        store.cancel(one.id)
        assert store.get(one.id).is_ending
        assert measure(store.get(one.id)) == ("cancelled", "")
    store.delete(one.id)
    assert [found.id for found in store.all()] == [two.id]
    for name in (one.id, "..", "nowhere"):
        with pytest.raises(RunError, match="no evaluation"):
            store.get(name)
    (two.folder / "job.json").write_text("{")
    with pytest.raises(LbllmError, match="delete this evaluation"):
        _ = store.get(two.id).job
    (two.folder / "model-0.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        Parts(two.folder).opened(0)
