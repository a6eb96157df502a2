"""Zero-shot accuracy: against a count by hand of the likeliest choices, and what becomes of unknown tasks."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.commands.main import main
from lbllm.errors import ConfigError, CorpusError
from lbllm.measure.zero_shot import TASKS, likelihoods, normalized, task_names, zero_shot
from tests.helpers.cases import cases
from tests.helpers.tiny_models import SENTENCES, VOCABULARY, save_tiny, tiny

QUESTIONS = [
    {"goal": SENTENCES[k][:20], "sol1": SENTENCES[k][20:], "sol2": SENTENCES[k - 1][10:], "label": k % 2}
    for k in range(8)
]
PASSAGES = [{"passage": s, "question": s.lower().rstrip("."), "label": k % 2} for k, s in enumerate(SENTENCES)]


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of questions in place of LBLLM_DATA_DIR."""
    (tmp_path / "tasks").mkdir()
    for name, rows in (("piqa", QUESTIONS), ("boolq", PASSAGES)):
        with gzip.open(tmp_path / "tasks" / TASKS[name].file, "wt") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)
    monkeypatch.setenv("LBLLM_DATA_DIR", str(tmp_path))
    return tmp_path


@torch.no_grad()
def by_hand(name: str, rows: list[dict[str, object]], architecture: str = "llama") -> float:
    """The share of questions whose right choice has the greatest log-likelihood, in piqa's case per byte."""
    model, tokenizer = tiny(architecture)
    right = 0
    for row in rows:
        if name == "piqa":
            text, choices = f"Question: {row['goal']}\nAnswer:", [str(row["sol1"]), str(row["sol2"])]
        else:
            text, choices = f"{row['passage']}\nQuestion: {row['question']}?\nAnswer:", ["no", "yes"]
        scores = []
        for choice in choices:
            context, whole = tokenizer(text).input_ids, tokenizer(f"{text} {choice}").input_ids
            logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            likelihood = sum(float(logits[at - 1, whole[at]]) for at in range(len(context), len(whole)))
            scores.append(likelihood / (len(choice) if name == "piqa" else 1))
        right += scores.index(max(scores)) == row["label"]
    return right / len(rows)


@pytest.mark.parametrize(("name", "rows"), [("piqa", QUESTIONS), ("boolq", PASSAGES)])
def test_the_score_is_the_share_of_right_choices(name: str, rows: list[dict[str, object]], data: Path) -> None:
    told: list[tuple[str, int, int]] = []
    (score,) = zero_shot(*tiny("llama"), [name], on_progress=lambda *step: told.append(step))
    assert score.accuracy == pytest.approx(by_hand(name, rows))
    assert score.examples == 8
    # Of a mean of 8 zeros and ones.
    assert score.stderr == pytest.approx(math.sqrt(score.accuracy * (1 - score.accuracy) / 7))
    assert score.chance == 1 / 2
    assert score.normalized == (name == "piqa")
    assert told[-1] == (name, 16, 16)
    (fewer,) = zero_shot(*tiny("llama"), [name], limit=3)
    assert fewer.examples == 3
    assert fewer.accuracy == pytest.approx(by_hand(name, rows[:3]))


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


def test_questions_of_the_hub_take_the_form_of_the_files() -> None:
    arc = {"question": "Why?", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}
    assert normalized(arc) == arc | {"choices": ["a", "b"], "label": 1}
    assert normalized({"ctx_a": "x", "label": "3"})["label"] == 3


def test_names() -> None:
    assert task_names("all") == list(TASKS)
    assert task_names("piqa, boolq,piqa") == ["piqa", "boolq"]
    with pytest.raises(ConfigError, match=r"task 'pica' is not known; choose from piqa, arc_easy"):
        task_names("piqa,pica")


def test_questions_that_cannot_be_had_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LBLLM_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(CorpusError, match=r"task piqa: baber/piqa can't be read from the hub.*tasks/piqa_validation"):
        list(zero_shot(*tiny("llama"), ["piqa"]))
