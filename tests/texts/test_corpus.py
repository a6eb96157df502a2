"""Texts become fixed token tensors: deterministic, unpadded, with parts that never mix."""

from __future__ import annotations

import gzip
import json
import random
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase

from benchmarks.answers import PROMPTS
from lbllm.config import make_config
from lbllm.errors import CorpusError
from lbllm.models.teacher import load_tokenizer
from lbllm.places import ASSETS, data_dir
from lbllm.texts.catalogue import TEXTS, CorpusEntry, location
from lbllm.texts.corpus import document_separator, load_corpus
from lbllm.texts.documents import SHARES, Document, Part, read_documents, sections, wikitext_articles, wikitext_rows
from lbllm.texts.windows import evaluation_tokens
from tests.helpers.cases import cases
from tests.helpers.tiny_models import SENTENCES, tiny_tokenizer

PARTS: tuple[Part, ...] = ("train", "tune", "heldout")


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


@pytest.fixture(autouse=True)
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty LBLLM_DATA_DIR."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setenv("LBLLM_DATA_DIR", str(folder))
    return folder


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


def _texts(count: int) -> list[str]:
    """Different documents, each with its number in it."""
    rng = random.Random(0)
    return [f"Document <{number}>. " + " ".join(rng.choices(SENTENCES, k=4)) for number in range(count)]


def _jsonl(path: Path, rows: list[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return _jsonl(tmp_path / "texts.jsonl", [{"text": text} for text in _texts(400)])


def test_shape_hash_and_determinism(corpus_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=1_000)
    assert corpus.sequences.shape == (16, 64)
    assert corpus.sequences.dtype == torch.long
    assert corpus.tokens == 1_024
    again = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=1_000)
    assert torch.equal(corpus.sequences, again.sequences)
    assert corpus.hash == again.hash
    other_seed = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=1_000, seed=1)
    assert other_seed.hash != corpus.hash
    assert load_corpus(str(corpus_file), tokenizer, seq_len=32, tokens=1_024).hash != corpus.hash


def test_fewer_tokens_are_a_prefix_of_more(corpus_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    few = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=640)
    many = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=6_400)
    assert torch.equal(many.sequences[:10], few.sequences)


def test_all_is_used_where_less_is_there(corpus_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    corpus = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=10**7)
    assert 10_000 < corpus.tokens < 10**6
    # Nothing is padded and nothing repeated: the documents and their separators fill the sequences.
    texts = str(tokenizer.decode(corpus.sequences.flatten())).split("<|end|>")
    numbers = [text.split(">")[0] for text in texts[:-1]]
    assert len(set(numbers)) == len(numbers) > 300
    assert not (corpus.sequences == tokenizer.pad_token_id).any()


def test_parts_never_share_a_document(corpus_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    found = {}
    for part in PARTS:
        corpus = load_corpus(str(corpus_file), tokenizer, seq_len=16, tokens=10**6, part=part)
        text = tokenizer.decode(corpus.sequences.flatten())
        found[part] = {number for number in range(400) if f"Document <{number}>" in text}
    assert not found["train"] & found["tune"]
    assert not found["train"] & found["heldout"]
    assert not found["tune"] & found["heldout"]
    assert len(found["train"] | found["tune"] | found["heldout"]) >= 397
    assert 330 < len(found["train"]) < 390


def test_shares_of_the_parts() -> None:
    parts = [Document(text).part for text in _texts(5_000)]
    for part in PARTS:
        assert abs(parts.count(part) / len(parts) - SHARES[part]) < 0.02


@given(st.text(max_size=200))
def test_same_text_is_in_the_same_part(text: str) -> None:
    assert Document(text, place="here").part == Document(f"\n {text}  ", place="there").part


@cases(200)
@given(st.text(alphabet="ab \n", max_size=400), st.integers(4, 60))
def test_sections_keep_the_text(text: str, limit: int) -> None:
    pieces = [piece.text for piece in sections(text, limit=limit)]
    assert all(0 < len(piece) <= limit for piece in pieces)
    assert "".join(pieces).split() == text.split()


def test_sections_end_at_paragraphs() -> None:
    text = "\n\n".join(f"{number} " + "word " * 30 for number in range(40))
    pieces = [piece.text for piece in sections(text, limit=1_000)]
    assert all(piece.endswith("\n\n") for piece in pieces[:-1])
    assert len(pieces) > 5


def test_one_long_text_file_has_all_parts(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "book.txt"
    rng = random.Random(1)
    path.write_text("\n\n".join(" ".join(rng.choices(SENTENCES, k=20)) for _ in range(1_000)))
    for part in PARTS:
        assert load_corpus(str(path), tokenizer, seq_len=64, tokens=64, part=part).tokens == 64


def test_one_short_document_is_for_training(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    for number in range(40):
        path = tmp_path / f"{number}.txt"
        path.write_text(f"{number} {SENTENCES[0]}")
        assert load_corpus(str(path), tokenizer, seq_len=8, tokens=8).tokens == 8
        with pytest.raises(CorpusError, match="tune part has 0 tokens in 0 documents"):
            load_corpus(str(path), tokenizer, seq_len=8, tokens=8, part="tune")


def test_conversations_go_through_the_template(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": "Bread."}]
    path = _jsonl(tmp_path / "chat.jsonl", [{"messages": messages}])
    corpus = load_corpus(str(path), tokenizer, seq_len=8, tokens=10_000)
    text = "<|start|>user\nWhat is it?<|end|>\n<|start|>assistant\nBread.<|end|>\n"
    expected = tokenizer.encode(text)
    assert corpus.sequences.flatten().tolist() == expected[: corpus.tokens]
    assert corpus.tokens > len(expected) - 8

    plain = tiny_tokenizer(chat=False)
    corpus = load_corpus(str(path), plain, seq_len=8, tokens=10_000)
    assert str(plain.decode(corpus.sequences.flatten())).startswith("What is it?\n\n")


def test_conversation_that_the_template_refuses(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    path = _jsonl(tmp_path / "chat.jsonl", [{"messages": [{"role": "user", "content": "Hi"}]}])
    with pytest.raises(CorpusError, match=r"chat\.jsonl, line 1: .*roles must alternate"):
        load_corpus(str(path), tokenizer, seq_len=8, tokens=8)


def test_start_token_begins_every_sequence(corpus_file: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    from tokenizers.processors import TemplateProcessing

    without = load_corpus(str(corpus_file), tokenizer, seq_len=63, tokens=630)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|start|> $A", special_tokens=[("<|start|>", tokenizer.bos_token_id)]
    )
    corpus = load_corpus(str(corpus_file), tokenizer, seq_len=64, tokens=640)
    assert (corpus.sequences[:, 0] == tokenizer.bos_token_id).all()
    assert torch.equal(corpus.sequences[:, 1:], without.sequences)


def test_document_separator_is_the_end_of_text() -> None:
    tokenizer = tiny_tokenizer()
    assert document_separator(tokenizer) == tokenizer.eos_token_id
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert document_separator(tokenizer) == tokenizer.convert_tokens_to_ids("<|endoftext|>")


def test_folders_and_gzip(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    with gzip.open(folder / "deep" / "b.jsonl.gz", "wt") as stream:
        stream.write(json.dumps({"text": "from gzip"}) + "\n\n")
    with gzip.open(folder / "c.txt.gz", "wt") as stream:
        stream.write("also from gzip")
    (folder / "a.txt").write_text("from text")
    (folder / "ignored.pdf").write_bytes(b"\xff")
    assert [document.text for document in read_documents(folder)] == ["from text", "also from gzip", "from gzip"]
    assert load_corpus(str(folder), tokenizer, seq_len=8, tokens=8).tokens == 8


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "fine"}\n{"text": oops}\n', r"a\.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"content": "x", "id": 1}\n', r"line 1: expected .*found content, id"),
        ("a.jsonl", b"[1]\n", "found list"),
        ("a.jsonl", b'{"messages": [{"role": "user"}]}\n', 'needs "role" and "content"'),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
        ("a.txt.gz", b"no gzip", "can't be read"),
        ("a.parquet", b"x", r"\.parquet file"),
        ("a.txt", b"  \n", "0 tokens in 0 documents"),
        ("a.txt", b"short", r"train part has \d tokens in 1 documents, one sequence needs 64"),
    ],
)
def test_bad_files_are_named(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(str(tmp_path / name), tokenizer, seq_len=64, tokens=64)


def test_unknown_names(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"'wiki' is not known.*close names: wikitext2, wikipedia"):
        load_corpus("wiki", tokenizer, seq_len=8, tokens=8)
    with pytest.raises(CorpusError, match="known: embedded, everyday, embedded-more, everyday-more, wikitext2"):
        load_corpus("zzz", tokenizer, seq_len=8, tokens=8)
    with pytest.raises(CorpusError, match="set LBLLM_DATA_DIR to a folder that contains text/wikipedia"):
        load_corpus("wikipedia", tokenizer, seq_len=8, tokens=8)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CorpusError, match="contains no text"):
        load_corpus(str(tmp_path / "empty"), tokenizer, seq_len=8, tokens=8)


@pytest.mark.usefixtures("no_hub")
def test_without_the_hub_the_way_out_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    for name in ("c4", "redpajama", "wikitext2"):
        with pytest.raises(CorpusError, match=r"can't be read from the hub.*use the corpus 'embedded'"):
            load_corpus(name, tokenizer, seq_len=8, tokens=8)
    with pytest.raises(CorpusError, match="can't be read from the hub"):
        evaluation_tokens("wikitext2", tokenizer, seq_len=8)


def test_files_of_the_data_folder_come_first(data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (data / "text").mkdir()
    assert data_dir() == data
    for entry in TEXTS:
        if entry.files and entry.files[0].startswith("text/"):
            with gzip.open(data / entry.files[0], "wt") as stream:
                stream.writelines(json.dumps({"text": f"{entry.id} {text}"}) + "\n" for text in _texts(40))
            corpus = load_corpus(entry.id, tokenizer, seq_len=32, tokens=32)
            assert corpus.tokens == 32
            assert location(entry) == str(data / entry.files[0])
            by_path = load_corpus(entry.files[0], tokenizer, seq_len=32, tokens=32)
            assert by_path.hash == corpus.hash


def test_location_without_files() -> None:
    known: dict[str, CorpusEntry] = {entry.id: entry for entry in TEXTS}
    assert location(known["c4"]) == "hub: allenai/c4"
    assert "LBLLM_DATA_DIR" in location(known["chat"])


def test_mixture_has_equal_shares(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    one = _jsonl(tmp_path / "one.jsonl", [{"text": text} for text in _texts(200)])
    two = _jsonl(tmp_path / "two.jsonl", [{"text": text.upper()} for text in _texts(200)])
    mixed = load_corpus(f"{one}+{two}", tokenizer, seq_len=32, tokens=640)
    alone = [load_corpus(str(path), tokenizer, seq_len=32, tokens=320) for path in (one, two)]
    assert torch.equal(mixed.sequences[0::2], alone[0].sequences)
    assert torch.equal(mixed.sequences[1::2], alone[1].sequences)


RAW = " \n = First = \n \n A line of text . \n \n = = Part = = \n \n More text . \n \n = Second = \n \n The end . \n"


def test_wikitext_rows_are_those_of_the_hub() -> None:
    rows = wikitext_rows(RAW.splitlines(keepends=True))
    assert rows[:4] == ["", " = First = \n", "", " A line of text . \n"]
    articles = [document.text for document in wikitext_articles(rows)]
    assert [text.split(" = ")[1] for text in articles] == ["First", "Second"]
    assert articles[0] == " = First = \n A line of text . \n = = Part = = \n More text . \n"
    # The same from a file whose blank lines were dropped.
    assert [document.text for document in wikitext_articles([row for row in rows if row])] == articles


def test_evaluation_windows_follow_the_protocol(data: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    (data / "wikitext-2-raw").mkdir()
    (data / "wikitext-2-raw" / "wiki.test.raw").write_text(RAW)
    (data / "wikitext-2-raw" / "wiki.train.raw").write_text(RAW.replace("First", "Train"))
    rows = [line if line.strip() else "" for line in RAW.splitlines(keepends=True)]
    ids = tokenizer("\n\n".join(rows))["input_ids"]
    windows = evaluation_tokens("wikitext2", tokenizer, seq_len=16)
    assert windows.shape == (len(ids) // 16, 16)
    assert windows.flatten().tolist() == ids[: len(ids) // 16 * 16]
    assert torch.equal(evaluation_tokens("wikitext2", tokenizer, seq_len=16, limit=2), windows[:2])
    # Training reads the train split alone.
    trained = load_corpus("wikitext2", tokenizer, seq_len=8, tokens=10**6)
    assert "Train" in tokenizer.decode(trained.sequences.flatten())
    assert "First" not in tokenizer.decode(trained.sequences.flatten())


def test_evaluation_of_a_file(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = tmp_path / "text.txt"
    path.write_text(SENTENCES[0] * 10)
    windows = evaluation_tokens(str(path), tokenizer, seq_len=16, limit=3)
    assert windows.flatten().tolist() == tokenizer.encode(SENTENCES[0] * 10)[:48]
    rows = _jsonl(tmp_path / "rows.jsonl", [{"text": SENTENCES[0]}, {"text": SENTENCES[1]}])
    windows = evaluation_tokens(str(rows), tokenizer, seq_len=4)
    assert windows.flatten().tolist()[:12] == tokenizer.encode(f"{SENTENCES[0]}\n\n{SENTENCES[1]}")[:12]
    with pytest.raises(CorpusError, match=r"text\.txt has \d+ tokens, one window needs 5000"):
        evaluation_tokens(str(path), tokenizer, seq_len=5_000)
    with pytest.raises(CorpusError, match="is not a file; give a file or wikitext2"):
        evaluation_tokens("c4", tokenizer, seq_len=16)


# An answer of the everyday corpus may name its model; the template's system message may not stay in either.
@pytest.mark.parametrize(
    ("name", "gone"),
    [
        ("embedded", "SmolLM"),
        ("everyday", "assistant named SmolLM"),
        ("embedded-more", "assistant named SmolLM"),
        ("everyday-more", "assistant named SmolLM"),
    ],
)
def test_corpus_of_the_embedded_model_for_it_and_for_others(name: str, gone: str) -> None:
    own = load_tokenizer("smollm2-135m-instruct")
    corpus = load_corpus(name, own, seq_len=512, tokens=16_384)
    assert corpus.sequences.shape == (32, 512)
    text = own.decode(corpus.sequences.flatten())
    assert "<|im_start|>user\n" in text
    for chat in (True, False):
        other = tiny_tokenizer(chat=chat)
        text = other.decode(load_corpus(name, other, seq_len=512, tokens=65_536).sequences.flatten())
        assert "<|im_" not in text
        assert gone not in text
        assert ("<|start|>assistant\n" in text) == chat


@pytest.mark.parametrize("name", ["everyday", "everyday-more"])
def test_the_everyday_corpus_holds_none_of_the_prompts_that_answers_are_shown_for(name: str) -> None:
    own = load_tokenizer("smollm2-135m-instruct")
    pieces = [load_corpus(name, own, seq_len=512, tokens=10**8, part=part).sequences for part in PARTS]
    text = str(own.decode(torch.cat([piece.flatten() for piece in pieces])))
    questions = set((ASSETS / f"{name.replace('-', '_')}_questions.txt").read_text().splitlines())
    asked = set(re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", text))
    assert asked <= questions
    assert len(asked) > 0.95 * len(questions)
    assert not questions & set(PROMPTS)


def test_embedded_corpus_has_text_for_the_quick_preset_and_to_judge_by() -> None:
    own = load_tokenizer("smollm2-135m-instruct")
    quick = make_config("quick")
    sizes = {part: load_corpus("embedded", own, seq_len=512, tokens=10**8, part=part).tokens for part in PARTS}
    assert sizes["train"] >= quick.tokens
    assert sum(sizes.values()) >= 1_000_000
    assert min(sizes.values()) >= 4_096
