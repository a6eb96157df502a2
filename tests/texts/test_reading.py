"""Files that people and programs really write: what is read of them, and what is refused in one message."""

from __future__ import annotations

import gzip
import json
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from lbllm.errors import CorpusError
from lbllm.texts import reading, windows
from lbllm.texts.catalogue import find_text
from lbllm.texts.corpus import load_corpus, reading_note
from lbllm.texts.documents import Document, read_documents, read_lines, sections
from lbllm.texts.windows import check_text, evaluation_tokens
from tests.helpers.tiny_models import SENTENCES, tiny_tokenizer

TEXT = " ".join(SENTENCES)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return tiny_tokenizer()


def trained(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    """What a run would learn from a file."""
    return str(tokenizer.decode(load_corpus(str(path), tokenizer, seq_len=8, tokens=10**6).sequences.flatten()))


def evaluated(path: Path, tokenizer: PreTrainedTokenizerBase) -> str:
    return str(tokenizer.decode(evaluation_tokens(str(path), tokenizer, seq_len=2).flatten()))


def jsonl(*rows: object) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROW = jsonl({"text": TEXT})


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.txt", b"\xef\xbb\xbf" + TEXT.encode()),
        ("a.TXT", TEXT.encode()),
        ("a.jsonl", b"\xef\xbb\xbf" + ROW),
        ("joined.jsonl", ROW + b"\xef\xbb\xbf" + ROW),
        ("a.jsonl", jsonl({"text": "\ufeff" + TEXT})),
        ("A.JSONL.GZ", gzip.compress(ROW)),
        ("a.txt.Gz", gzip.compress(b"\xef\xbb\xbf" + TEXT.encode())),
        ("a.jsonl", ROW.replace(b"\n", b"\r\n")),
    ],
)
def test_marks_and_capitals_change_nothing(
    name: str, content: bytes, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    for text in (trained(tmp_path / name, tokenizer), evaluated(tmp_path / name, tokenizer)):
        assert text.startswith(TEXT[:100])
        assert "\ufeff" not in text


def test_a_question_file_with_a_mark_has_the_same_questions(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"\xef\xbb\xbfWhat is it?\r\n")
    assert read_lines(tmp_path / "q.txt") == ["What is it?\n"]


@pytest.mark.parametrize(
    "row",
    [
        {"text": None},
        {"text": ""},
        {"text": " \n"},
        {"messages": None},
        {"messages": []},
        {"messages": [{"role": "user", "content": None}]},
        {"messages": [{"role": "assistant", "tool_calls": [{"name": "f"}]}]},
        {"text": None, "messages": [{"role": "user", "content": ""}]},
    ],
)
def test_rows_without_text_are_left_out_and_counted(
    row: object, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, caplog: pytest.LogCaptureFixture
) -> None:
    path, plain = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    path.write_bytes(jsonl(row) + ROW + jsonl(row))
    plain.write_bytes(ROW)
    corpus = load_corpus(str(path), tokenizer, seq_len=8, tokens=80)
    assert corpus.hash == load_corpus(str(plain), tokenizer, seq_len=8, tokens=80).hash
    assert corpus.left_out == 2
    assert evaluated(path, tokenizer) == evaluated(plain, tokenizer)
    assert "2 rows without text were left out" in caplog.text
    path.write_bytes(jsonl(row))
    with pytest.raises(CorpusError, match=r"0 tokens in 0 documents \(1 row without text was left out\)"):
        load_corpus(str(path), tokenizer, seq_len=8, tokens=80)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": 5}, 'found "text" as number'),
        ({"text": ["a"], "id": 1}, 'found "text" as list'),
        ({"messages": "hello"}, 'found "messages" as string'),
        ({"content": "x"}, "found content"),
        ({}, "found an empty object"),
        (None, "found null"),
        ("text", "found string"),
        ({"\ud800": 1}, r"found \?"),
        ({"k" * 10_000: 1}, r"found k{80}\.\.\."),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}]}, "as strings"),
    ],
)
def test_what_a_row_has_instead_is_told(row: object, message: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(jsonl(row))
    with pytest.raises(CorpusError, match=rf"a\.jsonl, line 1: .*{message}"):
        list(read_documents(tmp_path / "a.jsonl"))


def test_lone_surrogates_are_replaced_in_training_and_evaluation(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / "a.jsonl").write_bytes(
        jsonl({"text": f"\ud800{TEXT}"}, {"messages": [{"role": "u", "content": "\udcff"}]})
    )
    assert f"?{TEXT[:50]}" in trained(tmp_path / "a.jsonl", tokenizer)
    assert f"?{TEXT[:50]}" in evaluated(tmp_path / "a.jsonl", tokenizer)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"fine\nfine\nbad \xff\n", r"not UTF-8 text: line 3 has the byte 0xff"),
        ("a.txt", "é".encode("latin-1"), r"line 1 has the byte 0xe9"),
        ("a.txt", b"\xed\xa0\x80", r"line 1 has the byte 0xed"),
        ("a.jsonl", ROW + b'{"text": "\xe9"}', r"line 2 has the byte 0xe9"),
        ("a.txt", TEXT.encode("utf-16"), "is UTF-16 text, not UTF-8"),
        ("a.jsonl", ROW.decode().encode("utf-16-be").join([b"\xfe\xff", b""]), "is UTF-16 text"),
        ("a.txt", TEXT.encode("utf-32"), "is UTF-32 text"),
        ("a.txt.gz", gzip.compress(TEXT.encode("utf-16")), "is UTF-16 text"),
        ("a.txt", b"one\ntwo" + TEXT.encode("utf-16-le"), "line 2: a NUL byte"),
        ("a.txt", gzip.compress(TEXT.encode()), "contains gzip data"),
        ("a.txt.gz", gzip.compress(TEXT.encode())[:-9], "can't be read"),
        ("a.txt.gz", gzip.compress(TEXT.encode())[:-1] + b"\xff", "can't be read"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, "line 1: nested too deeply"),
        ("a.jsonl", ROW + b'{"text": "a", "id": ' + b"9" * 5_000 + b"}", "line 2: Exceeds the limit"),
        ("a.json", ROW, r"can't read text from a \.json file"),
        ("a.csv", b"text\nhello\n" * 100, r"can't read text from a \.csv file"),
        ("a.parquet", b"PAR1", r"can't read text from a \.parquet file"),
        ("a.txt", b"", "0 tokens"),
        ("a.txt.gz", b"", "0 tokens"),
        ("a.jsonl", b"\n\n", "0 tokens"),
    ],
)
def test_training_and_evaluation_refuse_the_same(
    name: str, content: bytes, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    (tmp_path / name).write_bytes(content)
    for read in (trained, evaluated):
        with pytest.raises(CorpusError, match=message) as raised:
            read(tmp_path / name, tokenizer)
        assert str(tmp_path / name) in str(raised.value)


def test_every_flipped_byte_of_a_gzip_file_is_read_or_refused(tmp_path: Path) -> None:
    packed = gzip.compress(jsonl(*({"text": f"{number} {line}"} for number, line in enumerate(SENTENCES))), mtime=0)
    path = tmp_path / "a.jsonl.gz"
    refused = []
    for place in range(len(packed)):
        path.write_bytes(packed[:place] + bytes([packed[place] ^ 0x55]) + packed[place + 1 :])
        try:
            list(read_documents(path))
        except CorpusError as error:
            refused.append(str(error))
    assert len(refused) > 0.9 * len(packed)
    assert all(str(path) in message for message in refused)


def test_hidden_files_of_a_folder_are_left_out(tmp_path: Path) -> None:
    for name in ("a.txt", "._a.txt", ".hidden.jsonl", ".git/b.txt", "deep/c.txt", "deep/.ipynb_checkpoints/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / name).write_bytes(b"\xff" if "/." in f"/{name}" else name.encode())
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere.txt")
    (tmp_path / "deep" / "up").symlink_to("..")
    os.mkfifo(tmp_path / "pipe.txt")
    assert [document.text for document in read_documents(tmp_path)] == ["a.txt", "deep/c.txt"]


def test_pipes_devices_and_loops_are_refused_at_once(tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    (tmp_path / "loop.txt").symlink_to("loop.txt")
    for name in ("pipe.txt", "zero.txt", "loop.txt"):
        for read in (trained, evaluated):
            with pytest.raises(CorpusError, match=name):
                read(tmp_path / name, tokenizer)
        with pytest.raises(CorpusError, match=name):
            read_lines(tmp_path / name)


@pytest.mark.parametrize("name", ["x" * 300, "a\0b", "x/" * 5_000, "~nobody-of-this-name/x", ""])
def test_impossible_names_are_unknown_names(name: str) -> None:
    assert find_text(name) is None


def test_a_line_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reading, "LONGEST_LINE", 1_000)
    (tmp_path / "a.jsonl").write_bytes(ROW + jsonl({"text": "a" * 1_000}))
    with pytest.raises(CorpusError, match="line 2: more than 1,000 characters"):
        list(read_documents(tmp_path / "a.jsonl"))
    # A text may be one line.
    (tmp_path / "a.txt").write_text("a" * 40_000)
    assert [document.size for document in read_documents(tmp_path / "a.txt")] == [16_000, 16_000, 8_000]


@pytest.mark.parametrize("length", [1, 7, 100, 10**6])
def test_a_text_in_pieces_has_the_same_sections(length: int) -> None:
    text = "\n\n".join(f"{number} " + "word " * (number % 37) + "\nline" for number in range(300))
    whole = list(sections(text, limit=400))
    pieces = [text[start : start + length] for start in range(0, len(text), length)]
    assert list(sections(pieces, limit=400)) == whole
    assert "".join(document.text for document in whole) == text


@pytest.mark.parametrize("paragraph", ["word " * 60 + "\n\n", "a"])
def test_the_time_for_sections_grows_with_the_text(paragraph: str) -> None:
    def seconds(characters: int) -> float:
        text = paragraph * (characters // len(paragraph))
        began = time.process_time()
        assert sum(document.size for document in sections(text)) == len(text)
        return time.process_time() - began

    seconds(1_000_000)
    assert seconds(64_000_000) < 2


def test_what_a_large_text_takes_is_told_before(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "large.txt"
    with path.open("wb") as file:
        file.write((TEXT + "\n").encode() * 100)
        file.truncate(1_000_000_000)  # a hole: it takes no room
    note = reading_note(f"embedded+{path}", 10_000)
    assert note is not None
    assert f"{path} has 1.00 GB. Only its first 64 million characters are read, enough for 10,000 tokens" in note
    assert reading_note("embedded", 10_000) is None
    with pytest.raises(CorpusError, match=r"1\.00 GB, more than the 64 million characters.*give --limit"):
        check_text(str(path), None)
    check_text(str(path), 10)
    # Only what a few windows need is read: the NUL bytes of the hole are not met.
    monkeypatch.setattr(windows, "SHORTEST", 10_000)
    monkeypatch.setattr(reading, "_PIECE", 1_000)
    assert evaluation_tokens(str(path), tokenizer, seq_len=16, limit=10).shape == (10, 16)


def test_a_few_windows_are_those_of_the_whole_text(
    tmp_path: Path, tokenizer: PreTrainedTokenizerBase, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.txt"
    path.write_text((" " * 300 + TEXT + "\n") * 50)
    whole = evaluation_tokens(str(path), tokenizer, seq_len=16)
    monkeypatch.setattr(windows, "SHORTEST", 100)
    monkeypatch.setattr(reading, "_PIECE", 100)
    for limit in (1, 5, 60):
        assert evaluation_tokens(str(path), tokenizer, seq_len=16, limit=limit).equal(whole[:limit])
    monkeypatch.setattr(windows, "LONGEST", 2_000)
    with pytest.raises(CorpusError, match="give a smaller --limit"):
        evaluation_tokens(str(path), tokenizer, seq_len=16, limit=10_000)
    with pytest.raises(CorpusError, match="give --limit"):
        evaluation_tokens(str(path), tokenizer, seq_len=16)


@pytest.mark.parametrize("check", [lambda name: check_text(name, None), lambda name: check_text(name, 3)])
def test_a_text_is_checked_before_a_model_is_loaded(check: Callable[[str], None], tmp_path: Path) -> None:
    check("wikitext2")
    check("embedded")
    for name in ("a.csv", "a.pdf", "a"):
        (tmp_path / name).write_text(TEXT)
        with pytest.raises(CorpusError, match="can't read text"):
            check(str(tmp_path / name))
    with pytest.raises(CorpusError, match="is not a file"):
        check(str(tmp_path))


def test_an_empty_document_is_a_row_without_text() -> None:
    assert Document(place="a.jsonl, line 1").empty
    assert not Document(" ").empty
