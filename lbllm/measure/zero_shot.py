"""Zero-shot accuracy on multiple-choice tasks, by lm-eval (EleutherAI): the model's answer is the choice with the
highest likelihood.

    for score in zero_shot(model, tokenizer, ["piqa", "arc_easy"], limit=500):
        print(score)

Prompts, choices, metrics and scoring are lm-eval's own, as its YAML files define them. Questions come from ``tasks/``
under LBLLM_DATA_DIR if they are there, else from the hub. A part of them is drawn at random, the same one for every
model.
"""

from __future__ import annotations

import json
import logging
import math
import random
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from pathlib import Path
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.errors import ConfigError, CorpusError
from lbllm.extras import extra
from lbllm.json_input import replaced
from lbllm.machine import float32_products
from lbllm.models.blocks import context_length
from lbllm.places import data_dir
from lbllm.texts.reading import json_rows
from lbllm.texts.sources import hub_dataset

BATCH = 8  # choices per batch if they go through the model one by one
TRIED = 5  # questions to test whether all choices of a question can go through at once
TOLERANCE = 1e-2  # largest difference in log-likelihood between the two ways
QUESTIONS_SEED = 0
LONGEST = 2_048  # tokens of a question with its answer; longer ones lose their beginning

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Task:
    """``folder``: where lm-eval keeps the task's YAML file. ``chance``: the accuracy of guessing. ``member``: the name
    of one of its parts, whose file is used for all, with these ``changes``."""

    folder: str
    chance: float
    member: str | None = None
    changes: Mapping[str, str] = field(default_factory=dict)


# lm-eval has a file for each of MMLU's subjects. They differ in the subject's name only, which every question has.
_MMLU = {
    "dataset_name": "all",
    "description": "",
    "doc_to_text": "The following are multiple choice questions (with answers) about {{subject.replace('_', ' ')}}.\n\n"
    "{{question.strip()}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
}

TASKS: dict[str, _Task] = {
    "piqa": _Task("piqa", 1 / 2),
    "arc_easy": _Task("arc", 1 / 4),
    "arc_challenge": _Task("arc", 1 / 4),
    "hellaswag": _Task("hellaswag", 1 / 4),
    "boolq": _Task("super_glue/boolq", 1 / 2),
    "openbookqa": _Task("openbookqa", 1 / 4),
    "winogrande": _Task("winogrande", 1 / 2),
    "mmlu": _Task("mmlu/default", 1 / 4, "mmlu_abstract_algebra", _MMLU),
}
# The tasks of LBLLM's paper.
PAPER_TASKS = ("piqa", "arc_easy", "arc_challenge", "boolq", "hellaswag", "winogrande", "mmlu")


@dataclass(frozen=True)
class Score:
    """The share of right answers, its standard error, and the share that guessing reaches. ``normalized``: likelihoods
    are compared per byte, as is usual where choices differ in length."""

    task: str
    accuracy: float
    stderr: float
    chance: float
    examples: int
    normalized: bool


def task_names(text: str) -> list[str]:
    """The tasks that ``all``, ``paper`` or names separated by commas mean. Raises ConfigError naming an unknown one."""
    sets = {"all": list(TASKS), "paper": list(PAPER_TASKS)}
    names = sets.get(text) or [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"task {name!r} is not known; choose from {', '.join(TASKS)}, or paper, or all")
    return list(dict.fromkeys(names))


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    seed: int = QUESTIONS_SEED,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Score]:
    """Yield the score in each task, on all questions or on ``limit`` of them, drawn at random with ``seed``.

    ``on_progress(task, done, total)`` counts choices. Raises CorpusError if the questions are not available.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with extra("eval", "zero-shot evaluation"):
        import lm_eval.api.task as tasks
        from lm_eval import simple_evaluate

    vars(tasks)["tqdm"] = partial(tasks.tqdm, disable=True)  # its bars would cover the caller's
    judge = _judge(model, tokenizer)
    for name in names:
        judge.report = (lambda done, total, name=name: on_progress(name, done, total)) if on_progress else None
        manager = _manager(name)
        with float32_products(), _no_bars():
            found = simple_evaluate(
                model=judge,
                tasks=[_configured(name, manager, limit, seed)],
                num_fewshot=0,
                bootstrap_iters=2,  # a mean's standard error has a formula, but 0 omits it as well
                log_samples=False,
                task_manager=manager,
            )
        result = found["results"][_member(name)]
        metric = "acc_norm" if "acc_norm,none" in result else "acc"
        yield Score(
            task=name,
            accuracy=result[f"{metric},none"],
            stderr=result[f"{metric}_stderr,none"],
            chance=TASKS[name].chance,
            examples=found["n-samples"][_member(name)]["effective"],
            normalized=metric == "acc_norm",
        )


def _manager(name: str) -> Any:
    """lm-eval's catalogue of the one folder that has the task: reading all of them takes ten seconds."""
    from lm_eval import tasks

    folder = Path(tasks.__file__).parent / TASKS[name].folder
    return tasks.TaskManager(include_path=folder, include_defaults=False)


def drawn(name: str, total: int, limit: int, seed: int) -> list[int]:
    """The ascending numbers of ``limit`` of a task's ``total`` questions, drawn at random; the same for every model."""
    return sorted(random.Random(f"{seed} {name}").sample(range(total), limit))


def _member(name: str) -> str:
    """The name of the task in lm-eval's catalogue."""
    return TASKS[name].member or name


def _configured(name: str, manager: Any, limit: int | None, seed: int) -> Any:
    """The task as lm-eval's YAML file defines it, on all its questions or on ``limit`` of them. Raises CorpusError."""
    import datasets

    config = manager.task_index[_member(name)].cfg | TASKS[name].changes
    split = config.get("test_split") or config["validation_split"]
    found = _questions(name, config["dataset_path"], config.get("dataset_name"), split)
    if limit is not None and limit < len(found):
        # Here, not in lm-eval: lm-eval edits all questions of HellaSwag five times before it takes some of them.
        found = found.select(drawn(name, len(found), limit, seed))
    member = {
        "task": _member(name),
        **TASKS[name].changes,
        "custom_dataset": lambda **_: datasets.DatasetDict({split: found}),
        "training_split": None,
        "fewshot_split": None,
        "validation_split": split,
        "test_split": None,
    }
    # The catalogue accepts changes to a task's file only for the members of a group.
    return manager.load({"group": "zero_shot", "task": [member]})["tasks"][_member(name)]


@contextmanager
def _no_bars() -> Iterator[None]:
    """Without the progress bars of datasets, which would cover the caller's: some tasks edit their questions."""
    import datasets

    shown = datasets.is_progress_bar_enabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()


def _questions(name: str, dataset: str, configuration: str | None, split: str) -> Any:
    """All questions of a task as a datasets.Dataset in the form of the hub. Raises CorpusError."""
    from datasets import Dataset

    folder = data_dir()
    file = f"tasks/{name}_{split}.jsonl.gz"
    if folder is not None and (folder / file).is_file():
        return Dataset.from_list(_questions_of(folder / file))
    try:
        return hub_dataset(dataset, configuration, split, streaming=False)
    except CorpusError as error:
        raise CorpusError(
            f"task {name}: {dataset} can't be read from the hub. Without a connection set LBLLM_DATA_DIR to a "
            f"folder that has {file}"
        ) from error


def _questions_of(file: Path) -> list[dict[str, Any]]:
    """The questions of a file in the form of the hub. Raises CorpusError unless all have the same fields."""
    found: list[dict[str, Any]] = []
    for place, row in json_rows(file):
        try:
            # Lone surrogates are replaced in every text of the row.
            question = _hub_form(json.loads(replaced(json.dumps(row, ensure_ascii=False))))
            fields = question.keys()
        except (TypeError, ValueError, LookupError, AttributeError, RecursionError):
            raise CorpusError(f"{place}: not a question in the form of this file; copy it again") from None
        found.append(question)
        if fields != found[0].keys():
            raise CorpusError(f"{place}: its fields are not those of the first question; copy the file again")
    if not found:
        raise CorpusError(f"{file} has no questions; copy it again")
    return found


def _hub_form(row: dict[str, Any]) -> dict[str, Any]:
    """A question of a file, which has a list of choices and a label from 0, in the form of the hub: choices with
    letters, and the letter of the answer; for MMLU's, which have a subject, the list and the answer's number. Tasks
    whose choices are not in a list have the same form in both."""
    if "choices" not in row:
        return row
    if "subject" in row:
        return {name: value for name, value in row.items() if name != "label"} | {"answer": row["label"]}
    letters = dict(enumerate(string.ascii_uppercase[: len(row["choices"])]))
    return row | {
        "choices": {"text": row["choices"], "label": list(letters.values())},
        "answerKey": letters[row["label"]],
    }


def _judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """The loaded model as lm-eval's kind of model, which reports its progress. All choices of a question go through the
    model at once, after the question's text, if that gives the same likelihoods as one choice at a time."""
    from lm_eval.models.huggingface import HFLM

    class Judge(HFLM):
        report: Progress | None = None
        total = done = 0

        def loglikelihood(self, requests: Any, disable_tqdm: bool = False) -> Any:
            self.total, self.done = len(requests), 0
            return super().loglikelihood(requests, disable_tqdm=True)

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests: Any, *args: Any, **kwargs: Any) -> Any:
            asked = [(tuple(text), tuple(choice)) for _, text, choice in requests]
            longest = sorted(asked, key=lambda pair: -len(pair[0]) - len(pair[1]))[:TRIED]
            if sum(map(len, longest[0])) > self.max_length or not _same_at_once(self.model, longest):
                return super()._loglikelihood_tokens(requests, *args, **kwargs)
            found: list[tuple[float, bool]] = []
            for text, group in groupby(asked, key=lambda pair: pair[0]):
                found += likelihoods(self.model, text, [choice for _, choice in group])
                self._tell(len(found) - self.done)
            return found

        @torch.inference_mode()
        def _model_call(self, inps: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            logits: torch.Tensor = super()._model_call(inps, *args, **kwargs)
            self._tell(len(inps))
            return logits

        def _tell(self, more: int) -> None:
            self.done += more
            if self.report is not None:
                self.report(min(self.done, self.total), self.total)

    length = min(LONGEST, context_length(model) or LONGEST)
    return Judge(pretrained=model, tokenizer=tokenizer, batch_size=BATCH, max_length=length)


def likelihoods(
    model: PreTrainedModel, text: Sequence[int], choices: Sequence[Sequence[int]]
) -> list[tuple[float, bool]]:
    """The log-likelihood (nats) of each choice after the text, and whether greedy decoding would write it. ``text`` and
    ``choices`` are token ids.

    One pass: the choices stand in one row after the text. The positions of each begin at the text's end, and each sees
    only the text and itself. The model must take position ids and a mask of (1, 1, tokens, tokens).
    """
    start, pieces = len(text) - 1, [torch.tensor(choice) for choice in choices]
    # The text's last token predicts the first token of every choice; a choice's last token predicts nothing we need.
    own = [piece[:-1] for piece in pieces]
    ids = torch.cat([torch.tensor(text), *own])
    owner = torch.cat([torch.full((len(text),), -1), *(torch.full((len(one),), k) for k, one in enumerate(own))])
    positions = torch.cat([torch.arange(len(text)), *(torch.arange(len(one)) + len(text) for one in own)])
    seen = torch.ones(len(ids), len(ids)).tril().bool() & ((owner == -1) | (owner == owner[:, None]))
    mask = torch.zeros(seen.shape).masked_fill(~seen, -math.inf)
    given = model(
        input_ids=ids[None].to(model.device),
        position_ids=positions[None].to(model.device),
        attention_mask=mask[None, None].to(model.device),
        logits_to_keep=torch.arange(start, len(ids), device=model.device),
        use_cache=False,
    ).logits[0]
    first, *others = given.float().log_softmax(-1).cpu().split([1, *map(len, own)])
    found = []
    for piece, other in zip(pieces, others, strict=True):
        table = torch.cat([first, other])
        likelihood = float(table.gather(-1, piece[:, None]).sum())
        found.append((likelihood, bool((table.argmax(-1) == piece).all())))
    return found


def _same_at_once(model: PreTrainedModel, asked: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether ``likelihoods`` gives a choice after another one the same value as without the other, in most
    of these pairs of text and choice. Not in all: with quantized activations another order of summing may change a
    rounding. Attention with a sliding window gives other values."""
    apart = []
    for text, choice in asked:
        try:
            _, (together, _) = likelihoods(model, text, [choice + choice, choice])
        except (TypeError, ValueError, RuntimeError):
            return False
        ids = torch.tensor([text + choice], device=model.device)
        table = model(input_ids=ids, use_cache=False).logits[0, len(text) - 1 : -1].float().log_softmax(-1).cpu()
        apart.append(abs(float(table.gather(-1, torch.tensor(choice)[:, None]).sum()) - together))
    return median(apart) < TOLERANCE
