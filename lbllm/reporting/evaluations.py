"""What a report takes from stored evaluations, and the evaluations that are missing.

Whatever the page Evaluate or the command ``evaluate`` has measured of a teacher and its checkpoints counts, as long as
nobody has changed a model since. What is missing becomes evaluations of the same queue.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lbllm.chat.settings import ChatSettings
from lbllm.checkpoints.find import ALONE, FoundCheckpoint, find_model
from lbllm.errors import ConfigError, LbllmError
from lbllm.evaluation.baseline import Baseline, baseline, gptq_beside
from lbllm.evaluation.job import MOST_ANSWERING, MOST_MODELS, WINDOWS, EvaluationJob, Measure, make_job
from lbllm.evaluation.parts import Parts
from lbllm.evaluation.results import answers_results, task_results, text_results
from lbllm.evaluation.store import ACTIVE, Evaluation, EvaluationStore
from lbllm.evaluation.work import files_of
from lbllm.labels import CODE_BITS
from lbllm.models.catalogue import model_title
from lbllm.reporting.subjects import Subject
from lbllm.texts.catalogue import TEXTS
from lbllm.texts.prompts import example_prompts
from lbllm.texts.sources import wikitext_rows_of
from lbllm.texts.windows import check_text

MOST_SUBJECTS = 8  # of one teacher
_MOST_BASELINES = MOST_MODELS - MOST_SUBJECTS - 1
ANSWER_TOKENS = 96


@dataclass(frozen=True)
class Group:
    """Subjects that are measured against one ``teacher``; only those of a group can be compared."""

    teacher: str
    subjects: tuple[Subject, ...]

    @property
    def title(self) -> str:
        """The teacher as people read it."""
        return model_title(self.teacher)

    @property
    def answering(self) -> tuple[Subject, ...]:
        """The first subjects, whose answers fit beside the teacher's."""
        return self.subjects[: MOST_ANSWERING - 1]


@dataclass(frozen=True)
class Wish:
    """What a report shall have. ``text`` None: any that was measured, or else what the command `table` takes;
    ``prompts`` None: any that were answered, or else one example of each kind."""

    text: str | None = None
    windows: int | None = None
    seq_len: int | None = None
    prompts: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Stored:
    """A finished evaluation. ``titles``: its models as the report calls them; ``reference``: the teacher's index;
    ``numbers``: the subjects' indices by their names."""

    one: Evaluation
    job: EvaluationJob
    parts: Parts
    titles: tuple[str, ...]
    numbers: dict[str, int]

    @property
    def reference(self) -> int:
        """The teacher's index."""
        return self.job.reference

    def baseline_bits(self, number: int) -> float | None:
        """The stored bits per weight of a model that another method made; None for other models, and if they were not
        recorded."""
        opened = self.parts.opened(number)
        if baseline(self.job.models[number]) is None or opened is None:
            return None
        return opened.bits or None

    @property
    def machine(self) -> str:
        """Where it was measured, if it says so."""
        known = (self.parts.opened(number) for number in range(len(self.job.models)))
        return next((one.machine for one in known if one is not None and one.machine), "")


def groups_of(subjects: Sequence[Subject]) -> list[Group]:
    """The subjects that have a checkpoint and a teacher, by their teacher. Raises ConfigError for too many of one."""
    found: dict[str, list[Subject]] = {}
    for subject in subjects:
        if subject.teacher is not None:
            found.setdefault(place_of(subject.teacher), []).append(subject)
    for members in found.values():
        if len(members) > MOST_SUBJECTS:
            raise ConfigError(
                f"{len(members)} runs are of one teacher, and a report compares at most {MOST_SUBJECTS}; leave some out"
            )
    return [Group(members[0].teacher or "", tuple(members)) for members in found.values()]


def place_of(name: str) -> str:
    """A text that is equal for two names of one model."""
    made = baseline(name)
    if made is not None:
        return replace(made, teacher=place_of(made.teacher)).name
    try:
        found = find_model(name)
    except LbllmError:
        return name
    if isinstance(found, FoundCheckpoint):
        return f"{found.stated.resolve()}{'' if found.activations else ALONE}"
    return str(Path(found.place).resolve()) if found.kind in ("folder", "gguf") else f"{found.kind} {found.place}"


def stored(store: EvaluationStore, group: Group, measure: Measure, wish: Wish) -> list[Stored]:
    """The finished evaluations of a group that have results of its teacher and of all its subjects, the newest first.
    Of a text, of the same tasks and of the same prompts, the newest alone."""
    wanted = group.answering if measure == "prompts" else group.subjects
    teacher, places = place_of(group.teacher), {subject.name: place_of(subject.name) for subject in wanted}
    found: dict[Any, Stored] = {}
    for one in reversed(store.all()):
        try:
            made = _match(one, group, measure, wanted, teacher, places)
            if made is not None and (measure != "prompts" or wish.prompts in (None, made.job.prompts)):
                found.setdefault(_content(made.job), made)
        except LbllmError:  # damaged, or of a later version
            continue
    return sorted(found.values(), key=lambda made: not _is_wanted(made.job, wish))


def _content(job: EvaluationJob) -> Any:
    return {"text": (job.text, job.seq_len), "tasks": job.tasks, "prompts": job.prompts}[job.measure]


def _is_wanted(job: EvaluationJob, wish: Wish) -> bool:
    """Whether an evaluation is of the text, and as long, as the report shall have."""
    if job.measure != "text":
        return True
    text = None if wish.text is None else _text(wish.text)
    asked = ((text, job.text), (wish.windows, job.windows), (wish.seq_len, job.seq_len))
    return all(value is None or value == known for value, known in asked)


def _match(
    one: Evaluation,
    group: Group,
    measure: Measure,
    wanted: Sequence[Subject],
    teacher: str,
    places: Mapping[str, str],
) -> Stored | None:
    """An evaluation, if it has what is wanted. ``teacher``, ``places``: ``place_of`` the group's teacher and of the
    wanted subjects, by name."""
    if one.state != "done":
        return None
    job = one.job
    if job.measure != measure or job.teacher is None or place_of(job.teacher) != teacher:
        return None
    known = [place_of(name) for name in job.models]
    numbers = {name: known.index(place) for name, place in places.items() if place in known}
    parts = Parts(one.folder)
    read: dict[Measure, Callable[[EvaluationJob, Parts], dict[int, Any]]]
    read = {"text": text_results, "tasks": task_results, "prompts": answers_results}
    needed = {job.reference, *numbers.values()}
    if len(numbers) < len(wanted) or not needed <= read[measure](job, parts).keys():
        return None
    if any(not _is_unchanged(job, parts, number) for number in needed):
        return None
    titles = list(job.shown_names)
    titles[job.reference] = group.title
    for subject in wanted:
        titles[numbers[subject.name]] = subject.title
    return Stored(one, job, parts, tuple(titles), numbers)


def _is_unchanged(job: EvaluationJob, parts: Parts, number: int) -> bool:
    opened = parts.opened(number)
    return opened is not None and opened.files == files_of(job.models[number])


def missing(store: EvaluationStore, groups: Sequence[Group], wish: Wish) -> list[EvaluationJob]:
    """The evaluations that a report still needs. Raises CorpusError, ConfigError for a text that can't be read."""
    jobs = []
    for group in groups:
        texts = stored(store, group, "text", wish)
        if not any(_is_wanted(one.job, wish) for one in texts):
            jobs.append(_text_job(group, wish))
        if not stored(store, group, "prompts", wish):
            jobs.append(_prompts_job(group, wish))
    return jobs


def at_work(store: EvaluationStore, groups: Sequence[Group]) -> list[Evaluation]:
    """The evaluations of these groups that wait or work, as ``missing`` has made them."""
    names = {_name(group) for group in groups}
    found = []
    for one in store.all():
        if one.state in ACTIVE:
            try:
                found += [one] if one.job.name in names else []
            except LbllmError:
                continue
    return found


def _name(group: Group) -> str:
    return f"Report on {', '.join(subject.title for subject in group.subjects)}"[:200]


def _text_job(group: Group, wish: Wish) -> EvaluationJob:
    plain = [
        Baseline("round-to-nearest", group.teacher, CODE_BITS[quant.format], quant.group_size)
        for subject in group.subjects
        if subject.record.settings is not None
        for quant in (subject.record.settings.quant,)
    ]
    near = [gptq_beside(group.teacher, subject.bits) for subject in group.subjects if subject.bits is not None]
    names = [subject.name for subject in group.subjects]
    titles = [group.title, *(subject.title for subject in group.subjects)]
    extra = list(dict.fromkeys([*near, *plain]))[:_MOST_BASELINES]
    text, windows = _text(wish.text), wish.windows or WINDOWS
    check_text(text, windows)
    return make_job(
        name=_name(group),
        measure="text",
        models=(group.teacher, *names, *(one.name for one in extra)),
        titles=(*titles, *(one.title for one in extra)),
        teacher=group.teacher,
        text=text,
        windows=windows,
        seq_len=wish.seq_len,
    )


def _text(asked: str | None) -> str:
    """The text to measure on, from any folder: the one that was asked for, else WikiText-2, else the embedded text."""
    if asked is not None:
        return asked if asked in (entry.id for entry in TEXTS) else str(Path(asked).expanduser().resolve())
    try:
        wikitext_rows_of("test")
    except LbllmError:
        return "embedded"
    return "wikitext2"


def _prompts_job(group: Group, wish: Wish) -> EvaluationJob:
    return make_job(
        name=_name(group),
        measure="prompts",
        models=(group.teacher, *(subject.name for subject in group.answering)),
        titles=(group.title, *(subject.title for subject in group.answering)),
        teacher=group.teacher,
        prompts=wish.prompts or tuple(kind.prompts[0] for kind in example_prompts()),
        settings=ChatSettings(max_new_tokens=ANSWER_TOKENS, temperature=0.0),
    )
