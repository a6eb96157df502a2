"""Zero-shot accuracy on multiple-choice tasks, by lm-eval (EleutherAI): the answer is the choice that the model finds
likeliest.

    for score in zero_shot(model, tokenizer, ["piqa", "arc_easy"], limit=500):
        print(score)

Prompts and scoring are lm-eval's own. Questions come from ``tasks/`` under LBLLM_DATA_DIR where it has them, else from
the hub.
"""

from __future__ import annotations

import gzip
import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.errors import ConfigError, CorpusError
from lbllm.extras import extra
from lbllm.machine import float32_products
from lbllm.models.blocks import context_length
from lbllm.places import data_dir
from lbllm.texts.sources import hub_dataset

BATCH = 8  # questions' choices that go through the model at once
TRIED = 5  # questions that show whether a question's choices can go through at once
TOLERANCE = 1e-2  # of a choice's log-likelihood between two ways of summing
LONGEST = 2_048  # tokens of a question with its answer; longer ones lose their beginning

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class _Task:
    """``file``: normalized questions, with a label from 0. ``hub``: dataset, configuration and split of the same, in
    their own form. ``text`` and ``choices``: lm-eval's templates for normalized ones. ``chance``: the accuracy of a
    guess. ``normalized``: likelihoods are compared per byte, as is usual where choices differ in length."""

    file: str
    hub: tuple[str, str | None, str]
    text: str
    choices: str | list[str]
    chance: float
    normalized: bool = True


_QUESTION = "Question: {{question}}\nAnswer:"
TASKS: dict[str, _Task] = {
    "piqa": _Task(
        "piqa_validation.jsonl.gz",
        ("baber/piqa", None, "validation"),
        "Question: {{goal}}\nAnswer:",
        "{{[sol1, sol2]}}",
        1 / 2,
    ),
    "arc_easy": _Task(
        "arc_easy_test.jsonl.gz", ("allenai/ai2_arc", "ARC-Easy", "test"), _QUESTION, "{{choices}}", 1 / 4
    ),
    "arc_challenge": _Task(
        "arc_challenge_test.jsonl.gz", ("allenai/ai2_arc", "ARC-Challenge", "test"), _QUESTION, "{{choices}}", 1 / 4
    ),
    "hellaswag": _Task(
        "hellaswag_validation.jsonl.gz", ("Rowan/hellaswag", None, "validation"), "{{query}}", "{{endings}}", 1 / 4
    ),
    "boolq": _Task(
        "boolq_validation.jsonl.gz",
        ("aps/super_glue", "boolq", "validation"),
        "{{passage}}\nQuestion: {{question}}?\nAnswer:",
        ["no", "yes"],
        1 / 2,
        normalized=False,
    ),
    "openbookqa": _Task(
        "openbookqa_test.jsonl.gz", ("allenai/openbookqa", "main", "test"), "{{question_stem}}", "{{choices}}", 1 / 4
    ),
}


@dataclass(frozen=True)
class Score:
    """A share of right answers, its standard error, and that of guessing; ``normalized``: likelihood per byte."""

    task: str
    accuracy: float
    stderr: float
    chance: float
    examples: int
    normalized: bool


def task_names(text: str) -> list[str]:
    """The tasks that ``all`` or names joined by commas stand for. Raises ConfigError naming an unknown one."""
    names = list(TASKS) if text == "all" else [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TASKS:
            raise ConfigError(f"task {name!r} is not known; choose from {', '.join(TASKS)}, or all")
    return list(dict.fromkeys(names))


def zero_shot(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    limit: int | None = None,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Iterator[Score]:
    """The score in each task as it becomes known, on all questions or the first ``limit``.

    ``on_progress(task, done, total)`` counts choices. Raises CorpusError where questions can't be had.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with extra("eval", "zero-shot evaluation"):
        import lm_eval.api.task as tasks
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

    vars(tasks)["tqdm"] = partial(tasks.tqdm, disable=True)  # its bars would lie over the caller's
    judge = _judge(model, tokenizer)
    for name in names:
        judge.report = (lambda done, total, name=name: on_progress(name, done, total)) if on_progress else None
        task = TASKS[name]
        with float32_products():
            found = simple_evaluate(
                model=judge,
                tasks=[_configured(name, task)],
                num_fewshot=0,
                limit=limit,
                bootstrap_iters=2,  # a mean's standard error has a formula, but 0 leaves that out as well
                log_samples=False,
                task_manager=TaskManager(include_defaults=False),  # reading its catalogue takes ten seconds
            )
        metric = "acc_norm" if task.normalized else "acc"
        yield Score(
            task=name,
            accuracy=found["results"][name][f"{metric},none"],
            stderr=found["results"][name][f"{metric}_stderr,none"],
            chance=task.chance,
            examples=found["n-samples"][name]["effective"],
            normalized=task.normalized,
        )


def questions(name: str) -> list[dict[str, Any]]:
    """All questions of a task, from LBLLM_DATA_DIR or the hub, in the form of the former. Raises CorpusError."""
    task = TASKS[name]
    folder = data_dir()
    path = folder / "tasks" / task.file if folder is not None else None
    if path is not None and path.is_file():
        with gzip.open(path, "rt", encoding="utf-8") as stream:
            rows = [json.loads(line) for line in stream]
    else:
        dataset, configuration, split = task.hub
        try:
            rows = [normalized(dict(row)) for row in hub_dataset(dataset, configuration, split, streaming=False)]
        except CorpusError as error:
            raise CorpusError(
                f"task {name}: {dataset} can't be read from the hub. Without a connection set LBLLM_DATA_DIR to a "
                f"folder that has tasks/{task.file}"
            ) from error
    for row in rows:
        if "activity_label" in row:
            row["query"] = _cleaned(f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}")
            row["endings"] = [_cleaned(ending) for ending in row["endings"]]
    return rows


def normalized(row: dict[str, Any]) -> dict[str, Any]:
    """A question as the hub's datasets have it with a list of choices and a label from 0."""
    if "answerKey" in row:
        labels = row["choices"]["label"]
        return row | {"choices": row["choices"]["text"], "label": labels.index(row["answerKey"].strip())}
    return row | {"label": int(row["label"])}


def _cleaned(text: str) -> str:
    """HellaSwag's texts without WikiHow's marks in brackets, as lm-eval cleans them."""
    return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")


def _configured(name: str, task: _Task) -> Any:
    """lm-eval's own kind of task."""
    from datasets import Dataset, DatasetDict
    from lm_eval.api.task import ConfigurableTask

    rows = questions(name)
    metrics = ["acc", "acc_norm"] if task.normalized else ["acc"]
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: DatasetDict({"validation": Dataset.from_list(rows)}),
            "validation_split": "validation",
            "output_type": "multiple_choice",
            "doc_to_text": task.text,
            "doc_to_choice": task.choices,
            "doc_to_target": "label",
            "metric_list": [{"metric": name, "aggregation": "mean", "higher_is_better": True} for name in metrics],
            "metadata": {"version": 1.0},
        }
    )


def _judge(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Any:
    """lm-eval's model for one that is loaded, telling its progress. A question's choices go through the model at once,
    behind its text, where the model gives them what it gives them one by one."""
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
            if sum(map(len, longest[0])) > self.max_length or not _behind_one_text(self.model, longest):
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
    """The log-likelihood of each choice behind the text, token ids all, and whether it is what the model itself
    would write.

    One pass: the choices lie one behind the other, each counts its positions from the text's end and sees the text and
    itself alone. For models that take such a mask and position ids.
    """
    start, pieces = len(text) - 1, [torch.tensor(choice) for choice in choices]
    # The text's last token gives every choice's first one; a choice's own last token gives nothing that is asked for.
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


def _behind_one_text(model: PreTrainedModel, asked: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> bool:
    """Whether ``likelihoods`` gives a choice behind another one what the model gives it alone, in most of these texts
    with a choice: where activations are quantized another order of summing may move a rounding. Attention that sees a
    window alone is why it may not."""
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
