"""Let models answer the same prompts, one model after the other, so that the speed of each is its own."""

from __future__ import annotations

from lbllm.chat.lens import lens, same_vocabulary
from lbllm.chat.pool import Loaded
from lbllm.chat.stream import Messages, stream
from lbllm.errors import LbllmError, ModelError
from lbllm.evaluation.parts import GivenAnswer
from lbllm.evaluation.work import Work

LONGEST_ANSWER = 4_096  # tokens whose KL is measured, as many as the settings allow


def answer_prompts(work: Work) -> None:
    """Answer all prompts that have no answer yet, the teacher's first. A prompt that a model can't answer gets the
    reason in place of an answer. Raises LbllmError if no model answered, Cancelled."""
    job = work.job
    given = {number: len(work.parts.answers(number)) for number in job.order}
    work.begin(len(job.models) * len(job.prompts), sum(given.values()))
    teacher = None
    for number in job.order:
        is_teacher = job.teacher is not None and number == job.reference
        if given[number] == len(job.prompts) and not (is_teacher and min(given.values()) < len(job.prompts)):
            continue
        loaded = work.open(number)
        if loaded is None:
            work.leave_out(len(job.prompts) - given[number])
            continue
        if is_teacher:
            teacher = loaded
        elif teacher is not None and not same_vocabulary(teacher.tokenizer, loaded.tokenizer):
            work.caution(number, "Its tokenizer is not the teacher's, so there is no KL.")
        for prompt in job.prompts[given[number] :]:
            answer = _answer(work, loaded, prompt)
            kl = None
            if teacher is not None and not is_teacher and answer.text:
                kl = answer_kl(teacher, loaded, _messages(work, prompt), answer.text, template=job.settings.template)
            work.parts.add_answer(number, GivenAnswer(**{**vars(answer), "kl": kl}))
            work.tell(job.shown_names[number], work.done + 1)
        del loaded
    if not any(work.parts.answers(number) for number in job.order):
        raise ModelError("no model could answer: " + " ".join(work.problems))


def _messages(work: Work, prompt: str) -> Messages:
    system = work.job.settings.system.strip()
    said = [{"role": "system", "content": system}] if system else []
    return [*said, {"role": "user", "content": prompt}]


def _answer(work: Work, loaded: Loaded, prompt: str) -> GivenAnswer:
    text, last = "", None
    settings = work.job.settings
    try:
        for piece in stream(
            loaded.model,
            loaded.tokenizer,
            _messages(work, prompt),
            max_new_tokens=settings.max_new_tokens,
            temperature=settings.temperature,
            top_p=settings.top_p,
            repetition_penalty=settings.repetition_penalty,
            seed=settings.seed,
            template=settings.template,
        ):
            work.check()
            text, last = text + piece.text, piece
    except LbllmError as error:
        return GivenAnswer(error=str(error))
    if last is None:
        return GivenAnswer(error="the model wrote nothing")
    return GivenAnswer(text, last.tokens, last.tokens_per_second, last.first_token_seconds, last.cut)


def answer_kl(teacher: Loaded, student: Loaded, messages: Messages, answer: str, *, template: bool) -> float | None:
    """Return the mean KL(teacher || student) in nats over the tokens of the student's answer; None where the models do
    not share a vocabulary, or the answer has no token in both contexts."""
    if not same_vocabulary(teacher.tokenizer, student.tokenizer):
        return None
    models = (teacher.model, student.model)
    try:
        found = lens(*models, student.tokenizer, answer, messages=messages, template=template, limit=LONGEST_ANSWER)
    except ModelError:
        return None
    return found.mean_kl
