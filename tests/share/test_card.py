"""The model card: what is known is in it, what is not is called so, and nothing tells of the machine it was made on."""

from __future__ import annotations

import ast
import shlex
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from lbllm.checkpoints.record import RunRecord
from lbllm.commands.options import run_config
from lbllm.config import RunConfig, make_config
from lbllm.events import Evaluated
from lbllm.labels import row_labels
from lbllm.share.card import CardKind, Contents, model_card

CONTENTS = Contents("LlamaForCausalLM", 1000, 200, 775)
FILES = {"model.safetensors": 1234}
HELD_OUT = "held-out part of embedded, 4 windows of 512 tokens"
TABLE = "notes, v2.txt, 10 windows of 2048 tokens"


def record(**changes: Any) -> RunRecord:
    settings = changes.pop("settings", make_config("quick", {"corpus": "embedded+wikitext2"}, ("wat.epochs=3",)))
    known: dict[str, Any] = {
        "settings": settings,
        "base_model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "precision": "bfloat16",
        "licence": "Apache-2.0",
        "bpw": 3.0,
        "corpus_hash": "c0ffee",
        "corpus_tokens": 24_576,
        "evaluations": (
            Evaluated(what="aar", text=HELD_OUT, perplexity=48.94, tokens=2044),
            Evaluated(what="teacher", text=HELD_OUT, perplexity=11.96, tokens=2044),
            Evaluated(what="rtn", text=TABLE, perplexity=1234.5, tokens=9, kl=10.186, top1_agreement=0.002),
        ),
        "run": "20261122-103041-1d371b",
    }
    return RunRecord(**(known | changes))


def card(kind: CardKind = "packed", *, chat: bool = True, **changes: Any) -> ModelCard:
    files = {"m.gguf": 99} if kind == "gguf" else FILES
    return ModelCard(model_card(record(**changes), kind, "mine", files, CONTENTS, chat=chat))


def rows(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]


def test_front_matter() -> None:
    data = card().data.to_dict()
    assert data["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert data["base_model_relation"] == "quantized"
    assert (data["license"], data["library_name"], data["pipeline_tag"]) == (
        "apache-2.0",
        "transformers",
        "text-generation",
    )
    assert data["datasets"] == ["Salesforce/wikitext"]
    assert "lbllm" in data["tags"]
    assert card("gguf").data.to_dict()["library_name"] == "gguf"


@pytest.mark.parametrize(
    ("licence", "identifier", "name"),
    [
        ("MIT", "mit", None),
        ("Llama 3.2 Community License", "llama3.2", None),
        ("llama3.1", "llama3.1", None),
        ("OPT-175B License (research only)", "other", "opt-175b-license-research-only"),
        ("not stated in the folder", None, None),
        ("see https://huggingface.co/a/b", None, None),
        (None, None, None),
    ],
)
def test_licences(licence: str | None, identifier: str | None, name: str | None) -> None:
    found = card(licence=licence)
    data = found.data.to_dict()
    assert (data.get("license"), data.get("license_name")) == (identifier, name)
    assert f"Licence: {licence or 'not known'}." in found.text


def test_figures_stand_beside_the_commands_that_print_them() -> None:
    text = card().text
    settings = record().settings
    assert settings is not None
    labels = row_labels(settings, "bfloat16")
    found = rows(text.split("## Measured")[1].split("## Method")[0])
    assert [labels["teacher"], "11.96", "not measured", "not measured"] in found
    assert found.index([labels["teacher"], "11.96", "not measured", "not measured"]) < found.index(
        [labels["aar"], "48.94", "not measured", "not measured"]
    )
    assert [labels["rtn"], "1,234.50", "10.186", "0.2%"] in found
    table = "python -m lbllm table 20261122-103041-1d371b --text 'notes, v2.txt' --seq-len 2048 --limit 10"
    assert f"`{table}`" in text
    assert ["`model.safetensors`", "1,234"] in rows(text)
    assert "3.000 bits" in text
    assert "c0ffee" in text


def options(text: str) -> dict[str, Any]:
    """What the command in a card asks for, as the command line's own options would get it."""
    line = next(line for line in text.splitlines() if line.startswith("    python -m lbllm quantize"))
    words = shlex.split(line)[4:]
    found: dict[str, Any] = {"assignments": []}
    for key, value in zip(words[::2], words[1::2], strict=True):
        if key == "--set":
            found["assignments"].append(value)
        elif key != "--out":
            found[key.removeprefix("--").replace("-", "_")] = value
    return found


def test_the_command_gives_the_settings() -> None:
    assert run_config(**options(card().text)) == record().settings


def test_paths_of_the_machine_are_not_in_it() -> None:
    corpus = "embedded+/home/anna/diary/2026.txt"
    settings = make_config("quick", {"model": r"C:\anna\models\mine", "corpus": corpus})
    measured = (
        Evaluated(what="aar", text=f"held-out part of {corpus}, 4 windows of 512 tokens", perplexity=9.5, tokens=2044),
        Evaluated(what="aar", text="/home/anna/diary/2027.txt, 4 windows of 512 tokens", perplexity=8.5, tokens=2044),
    )
    text = card(settings=settings, base_model=None, evaluations=measured).content
    assert "anna" not in text
    assert "diary" not in text
    assert "embedded+2026.txt" in text
    assert "Text `embedded`: " in text
    assert "Text: 2026.txt, a text of whoever made this checkpoint" in text
    assert "--text 2027.txt --seq-len 512" in text
    assert "base_model" not in card(settings=settings, base_model=None).data.to_dict()


def test_a_model_of_the_hub_keeps_its_whole_name() -> None:
    settings = make_config("quick", {"model": "somebody/their-model"})
    assert "--model somebody/their-model " in card(settings=settings, base_model="somebody/their-model").content
    assert "--model their-model " in card(settings=settings, base_model=None).content


def test_what_is_not_known_is_called_so() -> None:
    text = card(settings=None, base_model=None, precision=None, bpw=None, corpus_hash=None, evaluations=()).content
    for said in ("The settings of the run are not known", "Not measured", "Text: not known", "SHA-256"):
        assert (said in text) == (said != "SHA-256")
    assert "None" not in text
    assert "the checkpoint has no figures" in card(evaluations=()).text


@pytest.mark.parametrize("kind", ["dense", "gguf"])
def test_a_dense_copy_says_that_it_is_none_of_the_packed_one(kind: CardKind) -> None:
    text = card(kind).text
    assert "Activations and KV cache are not quantized" in text
    assert "A16" in text
    assert "This dense copy itself was not measured" in text
    assert "import lbllm" not in text


def test_a_run_of_weights_alone_says_so() -> None:
    settings: RunConfig = make_config("quick", {"stages": ["ptq", "wat"]})
    text = card(settings=settings, evaluations=()).text
    assert "W(1+1)A16" in text
    assert "the run had no stage 3, which quantizes activations" in text
    assert '"aar"' not in text


HOSTILE = "x\n---\n\n# <script>alert(1)</script> | `a` [b](http://c) ``` *d* {{ 7 * 7 }}"


def test_no_name_breaks_out_of_the_card() -> None:
    settings = make_config("quick", {"model": HOSTILE, "corpus": f"embedded+{HOSTILE}"})
    known = record(
        settings=settings,
        base_model=HOSTILE,
        precision=HOSTILE,
        licence=HOSTILE,
        evaluations=(Evaluated(what="teacher", text=f"{HOSTILE}, 4 windows of 512 tokens", perplexity=9.5, tokens=9),),
    )
    text = model_card(known, "packed", HOSTILE, {f"{HOSTILE}.safetensors": 7}, CONTENTS, chat=False)
    data = ModelCard(text).data.to_dict()
    assert (data["base_model"], data["license"]) == (HOSTILE, "other")
    tags, headings = set[str](), list[str]()
    tokens = MarkdownIt("commonmark").enable("table").parse(ModelCard(text).text)
    for token in tokens:
        tags |= {inner.type for inner in (token, *(token.children or []))}
        if token.type == "heading_open":
            headings.append(tokens[tokens.index(token) + 1].content)
    assert headings[1:] == [
        "How to load it",
        "What it is made from",
        "Size",
        "Measured",
        "Method and settings",
        "Limits",
    ]
    assert not tags & {"html_block", "html_inline", "em_open", "hr", "fence"}
    assert all(row.count("|") - row.count(r"\|") in (3, 5) for row in text.splitlines() if row.startswith("| "))
    assert "49" not in text
    (line,) = (line for line in text.splitlines() if line.startswith("    folder = "))
    assert ast.literal_eval(line.partition(" = ")[2]) == HOSTILE
