"""Zero-shot accuracy: against a count by hand of the likeliest choices, and what becomes of unknown tasks."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from hypothesis import given
from hypothesis import strategies as st

from lbllm.commands.main import main
from lbllm.errors import ConfigError, CorpusError
from lbllm.measure.zero_shot import TASKS, _questions_of, drawn, likelihoods, task_names, zero_shot
from tests.helpers.cases import cases
from tests.helpers.tiny_models import SENTENCES, VOCABULARY, save_tiny, tiny

QUESTIONS: list[dict[str, Any]] = [
    {"goal": SENTENCES[k][:20], "sol1": SENTENCES[k][20:], "sol2": SENTENCES[k - 1][10:], "label": k % 2}
    for k in range(8)
]
PASSAGES = [{"passage": s, "question": s.lower().rstrip("."), "label": k % 2} for k, s in enumerate(SENTENCES)]


CHOICES: list[dict[str, Any]] = [
    {"question": s[:15], "question_stem": s[:15], "choices": [s[15:], "a lamp", s[:9]], "label": k % 3}
    for k, s in enumerate(SENTENCES)
]
ENDINGS = [
    {
        "activity_label": "Roof [substeps] work",
        "ctx_a": f"{s[:12]} [title] Go on.",
        "ctx_b": "he",
        "endings": [f"{s[12:]} [step]  now ", "sleeps.", "sings [loud] songs."],
        "label": k % 3,
    }
    for k, s in enumerate(SENTENCES)
]
SENTENCE_PAIRS = [
    {"sentence": f"{s[:12]} _ {s[12:]}", "option1": "the lamp", "option2": s[:7], "answer": str(1 + k % 2)}
    for k, s in enumerate(SENTENCES)
]
SUBJECTS = [
    {
        "subject": ("high_school_biology", "anatomy")[k % 2],
        "question": f" {s} ",
        "choices": list("wxyz"),
        "label": k % 4,
    }
    for k, s in enumerate(SENTENCES)
]
FILES: dict[str, list[dict[str, Any]]] = {
    "piqa_validation": QUESTIONS,
    "boolq_validation": PASSAGES,
    "arc_easy_test": CHOICES,
    "arc_challenge_test": CHOICES,
    "openbookqa_test": CHOICES,
    "hellaswag_validation": ENDINGS,
    "winogrande_validation": SENTENCE_PAIRS,
    "mmlu_test": SUBJECTS,
}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of questions in place of LBLLM_DATA_DIR."""
    (tmp_path / "tasks").mkdir()
    for file, rows in FILES.items():
        with gzip.open(tmp_path / "tasks" / f"{file}.jsonl.gz", "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("LBLLM_DATA_DIR", str(tmp_path))
    return tmp_path


def asked(name: str, row: dict[str, Any]) -> tuple[str, list[str]]:
    """The text before the choices, and the choices, as the tasks are known."""
    match name:
        case "piqa":
            return f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]]
        case "boolq":
            return f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]
        case "hellaswag":
            endings = [f"{row['endings'][0].split(' [')[0]} now", "sleeps.", "sings songs."]
            return f"Roof work: {row['ctx_a'].split(' [')[0]}. Go on. He", endings
        case "openbookqa":
            return row["question_stem"], row["choices"]
        case "mmlu":
            intro = "The following are multiple choice questions (with answers) about"
            choices = "\n".join(f"{letter}. {one}" for letter, one in zip("ABCD", row["choices"], strict=True))
            return f"{intro} {row['subject'].replace('_', ' ')}.\n\n{row['question'].strip()}\n{choices}\nAnswer:", [
                *"ABCD"
            ]
    return f"Question: {row['question']}\nAnswer:", row["choices"]


@torch.no_grad()
def by_hand(name: str, rows: list[dict[str, Any]], architecture: str = "llama") -> float:
    """The share of questions whose right choice has the greatest log-likelihood, but for boolq per byte."""
    model, tokenizer = tiny(architecture)
    right = 0
    for row in rows:
        text, choices = asked(name, row)
        scores = []
        for choice in choices:
            context, whole = tokenizer(text).input_ids, tokenizer(f"{text} {choice}").input_ids
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihood = sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole)))
            scores.append(likelihood / (1 if name == "boolq" else len(choice)))
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows)


@pytest.mark.parametrize(("name", "rows"), [("piqa", QUESTIONS), ("boolq", PASSAGES)])
def test_the_score_is_the_share_of_right_choices(name: str, rows: list[dict[str, Any]], data: Path) -> None:
    told: list[tuple[str, int, int]] = []
    (score,) = zero_shot(*tiny("llama"), [name], on_progress=lambda *step: told.append(step))
    assert score.accuracy == pytest.approx(by_hand(name, rows))
    assert score.examples == 8
    # Of a mean of 8 zeros and ones.
    assert score.stderr == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 7))
    assert score.chance == 1 / 2
    assert score.normalized == (name == "piqa")
    assert told[-1] == (name, 16, 16)


def test_some_questions_are_drawn_at_random_and_the_same_ones_every_time(data: Path) -> None:
    chosen = drawn("piqa", 8, 3, 0)
    assert chosen == drawn("piqa", 8, 3, 0) == sorted(set(chosen))
    assert len(chosen) == 3
    assert len({tuple(drawn(name, 100, 5, seed)) for name in TASKS for seed in range(4)}) == 4 * len(TASKS)
    counts = Counter(k for seed in range(2_000) for k in drawn("piqa", 8, 3, seed))
    assert all(count == pytest.approx(750, rel=0.1) for count in counts.values())
    (score,) = zero_shot(*tiny("llama"), ["piqa"], limit=3)
    assert score.examples == 3
    assert score.accuracy == pytest.approx(by_hand("piqa", [QUESTIONS[k] for k in chosen]))


@given(seed=st.integers(0, 1_000), text=st.integers(1, 12), lengths=st.lists(st.integers(1, 7), min_size=1, max_size=5))
@cases(15)
def test_choices_behind_one_text_have_the_likelihoods_they_have_alone(seed: int, text: int, lengths: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    tokens = [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in (text, *lengths)]
    for name in ("llama", "gpt2", "opt"):
        model, _ = tiny(name)
        with torch.no_grad():
            found = likelihoods(model, tokens[0], tokens[1:])
            for choice, (likelihood, greedy) in zip(tokens[1:], found, strict=True):
                logits = model(torch.tensor([tokens[0] + choice])).logits[0, text - 1 : -1].double().log_softmax(-1)
                assert likelihood == pytest.approx(
                    sum(float(row[k]) for row, k in zip(logits, choice, strict=True)), abs=1e-3
                )
                assert greedy == (logits.argmax(-1).tolist() == choice)


def test_a_model_whose_attention_has_windows_is_asked_choice_by_choice(data: Path) -> None:
    # Its windows of 8 tokens count what lies between, which a mask of one's own leaves out.
    (score,) = zero_shot(*tiny("gemma3"), ["piqa"])
    assert score.accuracy == pytest.approx(by_hand("piqa", QUESTIONS, "gemma3"))


def test_the_command_shows_both_models_and_what_is_kept(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(save_tiny(tmp_path / "model", "llama"))
    other = str(save_tiny(tmp_path / "other", "llama", num_hidden_layers=1))
    words = ["evaluate", "--model", folder, "--teacher", other, "--tasks", "piqa,boolq", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["average"].keys() == {folder, other}
    mine, theirs = (document["average"][name] for name in (folder, other))
    assert mine == pytest.approx((by_hand("piqa", QUESTIONS) + by_hand("boolq", PASSAGES)) / 2)
    if theirs != 0.5:
        assert document["kept_above_chance"] == pytest.approx((mine - 0.5) / (theirs - 0.5))
    assert main(words[:-1]) == 0
    table, said = capsys.readouterr()
    assert "%|" not in said  # a progress bar of somebody else's
    assert "piqa" in table
    assert "average" in table


@pytest.mark.parametrize(
    "name", ["arc_easy", pytest.param("arc_challenge", marks=pytest.mark.soak), "openbookqa", "hellaswag"]
)
def test_each_task_asks_what_lm_eval_asks(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (rows,) = (rows for file, rows in FILES.items() if file.startswith(name))
    (score,) = zero_shot(*tiny("llama"), [name])
    assert score.accuracy == pytest.approx(by_hand(name, rows))
    assert (score.examples, score.normalized) == (len(rows), True)
    assert "%|" not in capsys.readouterr().err


def test_mmlu_names_the_subject_of_each_question(data: Path) -> None:
    (score,) = zero_shot(*tiny("llama"), ["mmlu"])
    assert score.accuracy == pytest.approx(by_hand("mmlu", SUBJECTS))
    assert (score.task, score.examples, score.normalized) == ("mmlu", len(SUBJECTS), False)


@torch.no_grad()
def test_winogrande_compares_the_same_end_after_both_beginnings(data: Path) -> None:
    (score,) = zero_shot(*tiny("llama"), ["winogrande"])
    model, tokenizer = tiny("llama")
    right = 0
    for row in SENTENCE_PAIRS:
        beginning, end = row["sentence"].split("_")
        scores = []
        for option in ("option1", "option2"):
            ids = tokenizer(beginning + row[option]).input_ids
            whole = tokenizer(f"{beginning}{row[option]} {end.strip()}").input_ids
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            scores.append(sum(float(logits[at - 1, whole[at]]) for at in range(len(ids), len(whole))))
        right += str(1 + scores.index(max(scores))) == row["answer"]
    assert score.accuracy == pytest.approx(right / len(SENTENCE_PAIRS))


def test_questions_of_the_hub_give_the_same_score(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = [next(zero_shot(*tiny("llama"), [name])) for name in ("arc_easy", "piqa")]
    rows = [
        row | {"choices": {"text": row["choices"], "label": ["1", "2", "3"]}, "answerKey": str(row["label"] + 1)}
        for row in CHOICES
    ]
    hub = {
        ("allenai/ai2_arc", "ARC-Easy", "test"): [{k: v for k, v in row.items() if k != "label"} for row in rows],
        ("baber/piqa", None, "validation"): QUESTIONS,
    }
    monkeypatch.setattr(
        "lbllm.measure.zero_shot.hub_dataset",
        lambda name, configuration, split, *, streaming: Dataset.from_list(hub[name, configuration, split]),
    )
    monkeypatch.delenv("LBLLM_DATA_DIR")
    assert [next(zero_shot(*tiny("llama"), [name])) for name in ("arc_easy", "piqa")] == here


def test_names() -> None:
    assert task_names("all") == list(TASKS)
    assert task_names("piqa, boolq,piqa") == ["piqa", "boolq"]
    assert set(task_names("paper")) < set(TASKS)
    with pytest.raises(ConfigError, match=r"task 'pica' is not known; choose from piqa, arc_easy"):
        task_names("piqa,pica")


def test_questions_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match=r"task piqa: baber/piqa can't be read from the hub.*tasks/piqa_validation"):
        list(zero_shot(*tiny("llama"), ["piqa"]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "has no questions"),
        (b'{"question_stem": "a", "choices": ["x", "y"], "label": 0}\n[1]\n', "line 2: not a question"),
        (b'{"question_stem": "a", "choices": ["x", "y"], "label": 5}\n', "line 1: not a question"),
        (b'{"question_stem": "a", "choices": 3, "label": 0}\n', "line 1: not a question"),
        (b'{"goal": "a"}\n{"sol1": "b"}\n', "line 2: its fields are not those of the first question"),
        (b"{", "line 1: not JSON"),
        (b'{"goal": "\xff"}', "not UTF-8"),
    ],
)
def test_a_damaged_file_of_questions_is_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "piqa_validation.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    with pytest.raises(CorpusError, match=message) as raised:
        _questions_of(path)
    assert str(path) in str(raised.value)
    path.write_bytes(gzip.compress(json.dumps({"goal": "a\ud800"}).encode()))
    assert _questions_of(path) == [{"goal": "a?"}]
