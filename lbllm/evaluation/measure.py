"""Measure what an evaluation asks for, from where an earlier worker stopped."""

from __future__ import annotations

import torch

from lbllm import memory
from lbllm.evaluation.job import Measure
from lbllm.evaluation.prompt_work import answer_prompts
from lbllm.evaluation.store import Evaluation, State
from lbllm.evaluation.task_work import ask_tasks
from lbllm.evaluation.text_work import measure_text
from lbllm.evaluation.work import Cancelled, Work

_WORK = {"text": measure_text, "tasks": ask_tasks, "prompts": answer_prompts}


def measure(evaluation: Evaluation) -> tuple[State, str]:
    """Measure what is missing, in this process. Returns how it ended and what could not be measured.

    Raises LbllmError if nothing can be measured.
    """
    memory.keep_large_allocations()
    work = Work(evaluation.job, evaluation.folder)
    kind: Measure = work.job.measure
    try:
        work.check()
        with torch.no_grad():
            _WORK[kind](work)
    except Cancelled:
        return "cancelled", ""
    return "done", " ".join(work.problems)
