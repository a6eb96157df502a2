"""A new evaluation: which models, beside which teacher, on what. Nothing is loaded before Start."""

from __future__ import annotations

from typing import Any

import streamlit as st

from app.compare.models import Offer, choices, resolve
from app.paths import corpus_name
from app.view import sentence, size_text
from lbllm.chat.settings import ChatSettings
from lbllm.config import DEFAULT_MODEL, SHIPPED
from lbllm.errors import CorpusError, LbllmError
from lbllm.evaluation.job import (
    LONGEST_PROMPT,
    MOST_ANSWERING,
    MOST_MODELS,
    QUESTIONS,
    WINDOWS,
    EvaluationJob,
    Measure,
    make_job,
)
from lbllm.evaluation.prompt_files import LARGEST_FILE, read_prompts, typed_prompts
from lbllm.evaluation.store import ACTIVE, EvaluationStore
from lbllm.measure.zero_shot import TASKS
from lbllm.places import root
from lbllm.texts.catalogue import TEXTS, local_path
from lbllm.texts.prompts import example_prompts

MEASURES: dict[str, Measure] = {"Perplexity": "text", "Tasks": "tasks", "Prompts": "prompts"}
NO_TEACHER = ""
_ANSWER_TOKENS = 96


def show_form(evaluations: EvaluationStore) -> None:
    """The form, and Start, which opens the new evaluation's page."""
    offered = choices()
    left, right = st.columns([8, 5], vertical_alignment="bottom")
    with left:
        models = _models(offered)
    with right:
        teacher = _teacher(models, offered)
    kind = MEASURES.get(
        st.segmented_control(
            "What is measured",
            list(MEASURES),
            default="Perplexity",
            required=True,
            key="evaluate_measure",
            bind="query-params",
            label_visibility="collapsed",
        )
        or "",
        "text",
    )
    values: dict[str, Any] = {"measure": kind, "models": models, "teacher": teacher}
    problem = None
    try:
        values |= {"text": _text, "tasks": _tasks, "prompts": _prompts}[kind]()
    except LbllmError as error:
        problem = error
    _start(evaluations, values, offered, problem)


def _models(offered: dict[str, Offer]) -> list[str]:
    key, seen = "evaluate_models", "evaluate_models_address"
    asked = st.query_params.get("models")
    if asked and asked != st.session_state.get(seen):
        st.session_state[key] = list(dict.fromkeys(name for name in asked.split(",") if name))[:MOST_MODELS]
    elif key not in st.session_state:
        st.session_state[key] = [DEFAULT_MODEL, SHIPPED]
    picked: list[str] = st.multiselect(
        "Models",
        list(dict.fromkeys([*offered, *st.session_state[key]])),
        key=key,
        format_func=lambda value: offered[value].title if value in offered else str(value),
        accept_new_options=True,
        persist_state="session",
        placeholder="Choose models",
        help=f"Up to {MOST_MODELS}, or {MOST_ANSWERING} for prompts. Choose a checkpoint or a model of the catalogue, "
        "or type a run's id, a folder, a .gguf file or a hub id (owner/name).",
    )
    address = ",".join(picked)
    st.session_state[seen] = address
    if asked != address:
        st.query_params["models"] = address
    return picked


def _teacher(models: list[str], offered: dict[str, Offer]) -> str | None:
    key = "evaluate_teacher"
    teachers = [name for name in models if name not in offered or offered[name].name == name != SHIPPED]
    known = [*teachers, *(name for name in models if name not in teachers)]
    if st.session_state.get(key) not in (*known, NO_TEACHER):
        st.session_state[key] = known[0] if teachers else NO_TEACHER
    chosen = st.selectbox(
        "Measured against",
        [*known, NO_TEACHER],
        key=key,
        format_func=lambda value: "No teacher" if not value else offered[value].title if value in offered else value,
        persist_state="session",
        help="The teacher: KL and agreement are measured against it, and differences are from it.",
    )
    return chosen or None


def _text() -> dict[str, Any]:
    known = [entry.id for entry in TEXTS]
    key = "evaluate_text"
    if key not in st.session_state:
        here = [entry.id for entry in TEXTS if entry.id in ("wikitext2", "embedded") and local_path(entry) is not None]
        st.session_state[key] = "wikitext2" if "wikitext2" in here else "embedded"
    value = st.session_state[key]
    text, windows, length = st.columns([8, 3, 3])
    chosen = text.selectbox(
        "Text",
        known if value in known or not value else [value, *known],
        key=key,
        accept_new_options=True,
        persist_state="session",
        help=f"wikitext2 is its test part, as in papers; of other texts, the part that no run trains on. Or type a "
        f".txt or .jsonl file under {root()}.",
    )
    count = windows.number_input(
        "Windows",
        1,
        100_000,
        WINDOWS,
        key="evaluate_windows",
        persist_state="session",
        help="Each is a piece of the text that is predicted by itself. More windows, narrower intervals, more time.",
    )
    tokens = length.number_input(
        "Tokens in a window",
        16,
        131_072,
        2_048,
        key="evaluate_length",
        persist_state="session",
        help="Papers use 2,048. A model whose context is shorter takes its context.",
    )
    name = corpus_name(chosen or "")
    return {"text": name, "windows": count, "seq_len": None if tokens == 2_048 else tokens}


def _tasks() -> dict[str, Any]:
    tasks, questions, seed = st.columns([8, 3, 3])
    chosen = tasks.multiselect(
        "Tasks",
        list(TASKS),
        default=["piqa", "arc_easy"],
        key="evaluate_tasks",
        persist_state="session",
        placeholder="Choose tasks",
        help="Multiple choice, as lm-eval asks it: a model's answer is the choice that it finds most likely.",
    )
    count = questions.number_input(
        "Questions of each",
        1,
        100_000,
        QUESTIONS,
        key="evaluate_questions",
        persist_state="session",
        help="Drawn at random, the same for every model. More questions, narrower intervals, more time.",
    )
    number = seed.number_input(
        "Seed", 0, 10**6, 0, key="evaluate_seed", persist_state="session", help="Another seed draws other questions."
    )
    return {"tasks": chosen, "questions": count, "seed": number}


def _prompts() -> dict[str, Any]:
    key = "evaluate_prompts"
    if key not in st.session_state:
        st.session_state[key] = "\n".join(prompt for kind in example_prompts()[:2] for prompt in kind.prompts[:2])
    typed, file = st.columns([8, 6])
    text = typed.text_area("Prompts, one a line", key=key, height=160, persist_state="session")
    given = file.file_uploader(
        "Or a file",
        type=["txt", "jsonl"],
        key="evaluate_file",
        help=f'.txt with one prompt a line, or .jsonl with "prompt" in each row; up to {size_text(LARGEST_FILE)}. It '
        "takes the place of the lines.",
    )
    with file.container(horizontal=True, vertical_alignment="bottom"):
        tokens = st.number_input(
            ChatSettings.model_fields["max_new_tokens"].title or "",
            1,
            4_096,
            _ANSWER_TOKENS,
            key="evaluate_tokens",
            persist_state="session",
            width=150,
        )
        temperature = st.number_input(
            "Temperature",
            0.0,
            2.0,
            0.0,
            0.1,
            key="evaluate_temperature",
            persist_state="session",
            width=150,
            help="0: always the most likely token.",
        )
    prompts = typed_prompts(text or "") if given is None else read_prompts(given.name, given.getvalue())
    for number, prompt in enumerate(prompts, 1):
        if len(prompt) > LONGEST_PROMPT:
            raise CorpusError(f"prompt {number} has {len(prompt):,} characters; shorten it to {LONGEST_PROMPT:,}")
    typed.caption(f"{len(prompts):,} {'prompt' if len(prompts) == 1 else 'prompts'}")
    return {"prompts": prompts, "settings": ChatSettings(max_new_tokens=tokens, temperature=temperature)}


def _start(
    evaluations: EvaluationStore, values: dict[str, Any], offered: dict[str, Offer], problem: LbllmError | None
) -> None:
    said, button = st.columns([10, 3], vertical_alignment="center")
    job = None
    if problem is None:
        try:
            make_job(**values)
        except LbllmError as error:
            problem = error
        else:
            job = values
    ahead = sum(one.state in ACTIVE for one in evaluations.all())
    if problem is not None:
        said.warning(sentence(problem))
    elif ahead:
        said.caption(f"{ahead} {'is' if ahead == 1 else 'are'} ahead of it; this one waits for its turn.")
    pressed = button.button("Start", type="primary", width="stretch", key="evaluate_start", disabled=job is None)
    if pressed and job is not None:
        try:
            made = evaluations.create(_resolved(job, offered))
        except LbllmError as error:
            said.error(sentence(error))
            return
        evaluations.start(made.id)
        st.query_params.clear()
        st.query_params["evaluation"] = made.id
        st.rerun()


def _resolved(values: dict[str, Any], offered: dict[str, Offer]) -> EvaluationJob:
    """The job with the names that the engine takes. Raises ConfigError for a path that a page may not read."""
    found = {value: resolve(value, offered) for value in values["models"]}
    names = {value: offer.name for value, offer in found.items()}
    teacher = values["teacher"]
    titles = [offer.title for offer in found.values()]
    return make_job(
        **values
        | {
            "models": tuple(names.values()),
            "titles": tuple(titles),
            "teacher": names[teacher] if teacher is not None else None,
        }
    )
