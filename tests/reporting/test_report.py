"""The report: its figures are the engine's, all of it is escaped, and what is not known is said with the way to it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from lbllm.baselines.layer import Settings
from lbllm.baselines.methods import METHODS, quantize_blocks
from lbllm.baselines.rtn import round_to_nearest
from lbllm.checkpoints.find import open_model
from lbllm.config import make_config
from lbllm.errors import ConfigError
from lbllm.evaluation.measure import measure
from lbllm.evaluation.store import EvaluationStore, write_end
from lbllm.measure.perplexity import divergence
from lbllm.models.blocks import context_length, share_copy
from lbllm.models.teacher import load_teacher
from lbllm.reporting.evaluations import MOST_SUBJECTS, Wish, at_work, groups_of, missing, stored
from lbllm.reporting.page import report, report_name
from lbllm.reporting.subjects import Subject, find_subjects
from lbllm.reporting.words import in_words
from lbllm.runs.notes import write_note
from lbllm.runs.store import Run, RunStore
from lbllm.texts.corpus import load_corpus
from lbllm.texts.windows import evaluation_windows
from lbllm.units import number_text
from tests.helpers.finished_run import finished_run
from tests.helpers.homes import own_home
from tests.helpers.pages import HOSTILE, Reader
from tests.helpers.played_run import PlayedRun
from tests.helpers.tiny_models import SENTENCES


class Made:
    """A home with a finished run of a tiny model, and a text to measure it on."""

    def __init__(self, folder: Path) -> None:
        self.runs = RunStore(folder / "home" / "runs")
        self.evaluations = EvaluationStore(folder / "home" / "evaluations")
        self.run: Run = finished_run(self.runs, folder, ("ptq", "wat"))
        self.text = folder / "read.txt"
        self.text.write_text("\n".join(f"{n} {line}" for n in range(12) for line in SENTENCES))
        self.wish = Wish(str(self.text), 6, 32, ("Why?", HOSTILE))

    def subjects(self, *names: str) -> list[Subject]:
        return find_subjects(names or (self.run.id,), self.runs)

    def measure(self, subjects: list[Subject], wish: Wish) -> int:
        """Measure what is missing in this process, as workers would; how many evaluations that were."""
        jobs = missing(self.evaluations, groups_of(subjects), wish)
        for job in jobs:
            one = self.evaluations.create(job)
            write_end(one.folder, *measure(one))
        return len(jobs)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    folder = tmp_path_factory.mktemp("report")
    own_home(folder / "home", "kernels")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LBLLM_HOME", str(folder / "home"))
        patch.setattr("lbllm.reporting.evaluations.ANSWER_TOKENS", 6)
        yield Made(folder)


def test_a_run_without_an_evaluation_is_reported_as_far_as_it_is_known(made: Made) -> None:
    page = report(made.subjects(), EvaluationStore(made.text.parent / "none"))
    read = Reader(page)
    assert read.inside == []
    assert "Perplexity and KL are not measured yet" in read.text
    assert f"python -m lbllm report {made.run.id}" in read.text
    assert "Stage 2: weight-aware training" in read.text
    assert "groups of" not in read.text
    assert "16 neighbouring weights of a row share their levels." in read.text
    # The losses of both stages are drawn and stated.
    assert page.count("<polyline") == 3
    assert "Mean after" in read.text
    size = sum(file.stat().st_size for file in (made.run.folder / "checkpoint").glob("*.safetensors"))
    assert f"{size / 1e3:.1f} kB" in read.text


def test_figures_are_those_of_the_engine(made: Made) -> None:
    subjects = made.subjects()
    assert made.measure(subjects, made.wish) == 2
    assert made.measure(subjects, made.wish) == 0
    assert made.measure(subjects, Wish()) == 0
    (group,) = groups_of(subjects)
    (text,) = stored(made.evaluations, group, "text", made.wish)
    assert text.numbers == {made.run.id: 1}
    read = Reader(report(subjects, made.evaluations, made.wish))
    teacher = load_teacher(made.run.config.model)
    windows = evaluation_windows(str(made.text), teacher.model, teacher.tokenizer, 32, 6)
    student = divergence(teacher.model, open_model(made.run.id)[0], windows)
    plain = divergence(teacher.model, round_to_nearest(teacher.model, 2, 16), windows)
    gptq, name = share_copy(teacher.model), str(text.job.models[2])
    corpus = load_corpus("embedded", teacher.tokenizer, seq_len=min(512, context_length(gptq) or 512), tokens=8_192)
    way = Settings(128, int(name.split(":")[1]), clip=True, act_order=True)
    size = quantize_blocks(gptq, corpus.sequences, METHODS["gptq"], way)
    better = divergence(teacher.model, gptq, windows)
    for figure in (
        student.teacher_perplexity,
        student.student_perplexity,
        student.kl,
        plain.student_perplexity,
        better.student_perplexity,
        better.kl,
    ):
        assert number_text(figure) in read.text
    assert f"{100 * student.top1_agreement:.1f}%" in read.text
    rtn = quantize_blocks(share_copy(teacher.model), corpus.sequences, METHODS["rtn"], Settings(16, 2))
    assert f"Round to nearest, W2A16, groups of 16 ({rtn.bpw:.2f} bits per weight)" in read.text
    assert f"GPTQ, W{way.bits}A16, groups of 128 ({size.bpw:.2f} bits per weight)" in read.text
    assert "6 windows of 32 tokens" in read.text
    assert "On the text read.txt" in read.text
    assert str(made.text.parent) not in read.text
    assert re.search(r"on .+, \d+ threads?\.", read.text)
    # Other prompts are other answers; the text is known already.
    assert [job.measure for job in missing(made.evaluations, [group], Wish(prompts=("Who?",)))] == ["prompts"]
    assert at_work(made.evaluations, [group]) == []


def test_what_is_measured_of_a_changed_model_does_not_count(made: Made) -> None:
    subjects = made.subjects()
    made.measure(subjects, made.wish)
    config = made.run.folder / "checkpoint" / "config.json"
    before = config.read_bytes()
    try:
        config.write_bytes(before + b" ")
        assert [job.measure for job in missing(made.evaluations, groups_of(subjects), made.wish)] == ["text", "prompts"]
    finally:
        config.write_bytes(before)


def test_everything_is_escaped_and_nothing_is_loaded(made: Made) -> None:
    made.runs.rename(made.run.id, HOSTILE)
    write_note(made.runs, made.run.id, HOSTILE)
    subjects = made.subjects()
    made.measure(subjects, made.wish)
    page = report(subjects, made.evaluations, made.wish)
    read = Reader(page)
    assert read.inside == []
    assert read.tags.isdisjoint({"script", "img", "link", "iframe", "a"})
    assert not any(name.startswith("on") for name in read.attributes)
    assert read.attributes.isdisjoint({"src", "href"})
    assert read.text.count(HOSTILE) >= 3
    for asked in ("http://", "https://", "url(", "@import"):
        assert asked not in page
    assert "default-src 'none'" in page
    made.runs.rename(made.run.id, "tiny one")


def test_several_runs_are_compared_and_one_at_work_says_so(made: Made) -> None:
    other = finished_run(made.runs, made.text.parent, ("ptq",), seed=1)
    played = PlayedRun(made.runs, "at work")
    try:
        subjects = made.subjects(made.run.id, other.id, played.run.id, str(made.run.folder))
        assert [subject.title for subject in subjects] == [
            f"tiny one ({made.run.id})",
            f"tiny one ({other.id})",
            "at work",
        ]
        made.measure(subjects, made.wish)
        page = report(subjects, made.evaluations, made.wish)
    finally:
        played.close()
    read = Reader(page)
    assert "3 models compared" in read.text
    assert "This run is not finished: it is running. 3 of 6 parts are finished." in read.text
    assert "what needs its checkpoint is missing" in read.text
    assert "What differs" in read.text
    assert "Perplexity against bits per binarized weight" in read.text
    assert "different teachers" in read.text
    assert report_name([subject.title for subject in subjects]) == "report-3-models.html"
    with pytest.raises(ConfigError, match=f"at most {MOST_SUBJECTS}"):
        groups_of([Subject(str(n), "", subjects[0].record, teacher="same") for n in range(MOST_SUBJECTS + 1)])


def test_a_checkpoint_elsewhere_needs_a_teacher_by_name(made: Made, tmp_path: Path) -> None:
    folder = tmp_path / "given away"
    shutil.copytree(made.run.folder / "checkpoint", folder)
    (subject,) = find_subjects([str(folder)], made.runs, made.run.config.model)
    assert subject.teacher == made.run.config.model
    read = Reader(report([subject], made.evaluations))
    assert read.text.count("given away") > 1
    assert str(tmp_path) not in read.text
    assert "stored with the run, not with the checkpoint" in read.text


def test_settings_are_said_in_words() -> None:
    said = in_words(make_config("quick", {"quant": {"act_bits": 4, "skip": ["*.down_proj"]}}, ("quant.group_size=-1",)))
    assert said["Groups"].startswith("All weights of a row share their levels.")
    assert said["Left in 16 bits"] == "The layers named *.down_proj."
    assert "have 4 bits" in said["Activations"]
    assert "the whole model" not in " ".join(said.values())
