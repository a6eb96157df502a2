"""Texts: a catalogue of corpora, and from any of them fixed token tensors with a hash.

    load_corpus("embedded", tokenizer, seq_len=512, tokens=32_768)                      catalogue
    load_corpus("notes/", tokenizer, seq_len=512, tokens=32_768, part="heldout")        .txt and .jsonl(.gz) files
    load_corpus("embedded+wikipedia", tokenizer, seq_len=512, tokens=32_768)            equal shares
    evaluation_tokens("wikitext2", tokenizer, seq_len=2048, limit=None)                 consecutive windows

A corpus is split into train, tune and held-out parts by each document's hash, so the same text is never in two parts,
whatever is asked for. Nothing is padded: documents are joined, with the tokenizer's document separator between them,
and cut.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import os
import random
import re
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lbllm import hub
from lbllm.bundle import ASSETS
from lbllm.documents import (
    SHARES,
    Document,
    Part,
    parse_row,
    read_documents,
    read_lines,
    read_text,
    sections,
    wikitext_articles,
    wikitext_rows,
)
from lbllm.errors import CorpusError

# How much of a source is read for a number of tokens: texts have 4 to 5 characters a token, so 8 leave room to spare.
_CHARACTERS_PER_TOKEN = 8
_READ_ALWAYS = 64_000_000
_BATCH = 128
_NO_HUB = (
    "{} can't be read from the hub ({}). Without a connection use the corpus 'embedded', or download the text "
    "elsewhere and give its file or folder"
)


@dataclass(frozen=True)
class CorpusEntry:
    """One catalogue line. Read from ``asset``, which comes with the project, or from ``files`` under LBLLM_DATA_DIR,
    else from ``hub`` (dataset, configuration)."""

    id: str
    note: str
    licence: str
    files: tuple[str, ...] = ()
    hub: tuple[str, str | None] | None = None
    asset: str | None = None


CATALOGUE: tuple[CorpusEntry, ...] = (
    CorpusEntry(
        "embedded",
        "1.2 million tokens sampled from the embedded model itself, half conversations, half documents; comes with "
        "this program",
        "Apache-2.0, as the model",
        asset="corpus.jsonl.gz",
    ),
    CorpusEntry(
        "everyday",
        "360 thousand tokens of questions of everyday life and answers, most by the embedded model, the others by its "
        "binarized copy; comes with this program",
        "Apache-2.0, as the model",
        asset="everyday.jsonl.gz",
    ),
    CorpusEntry(
        "embedded-more",
        "260 thousand tokens more of the kind of `embedded`; comes with this program",
        "Apache-2.0, as the model",
        asset="embedded_more.jsonl.gz",
    ),
    CorpusEntry(
        "everyday-more",
        "520 thousand tokens of other everyday questions and answers, three quarters by the embedded model, the others "
        "by a better binarized copy of it; comes with this program",
        "Apache-2.0, as the model",
        asset="everyday_more.jsonl.gz",
    ),
    CorpusEntry(
        "wikitext2",
        "WikiText-2 raw (Merity et al. 2016): the train split to train on, the test split to evaluate",
        "CC BY-SA 3.0",
        ("wikitext-2-raw/wiki.train.raw", "wikitext-2-raw/wiki.train.head.raw.txt"),
        ("Salesforce/wikitext", "wikitext-2-raw-v1"),
    ),
    CorpusEntry(
        "c4",
        "C4, English web text (Raffel et al. 2020)",
        "ODC-BY 1.0",
        ("text/c4_demo_300.jsonl.gz",),
        ("allenai/c4", "en"),
    ),
    CorpusEntry(
        "redpajama",
        "a sample of SlimPajama, which is RedPajama (Together 2023) without duplicates",
        "of its sources; Common Crawl, C4, GitHub, books, arXiv, Wikipedia, StackExchange",
        ("text/redpajama.jsonl.gz",),
        ("DKYoon/SlimPajama-6B", None),
    ),
    CorpusEntry(
        "wikipedia",
        "lead sections of Wikipedia's vital articles",
        "CC BY-SA 4.0",
        ("text/wikipedia_vital_articles_leads.jsonl.gz",),
    ),
    CorpusEntry("chat", "conversations, through the model's chat template", "see the folder's source list", ("chat",)),
)


@dataclass(frozen=True)
class Corpus:
    """``sequences``: int64 token ids (n, seq_len). ``hash``: SHA-256 over them and seq_len."""

    name: str
    hash: str
    sequences: Tensor

    @property
    def tokens(self) -> int:
        """The tokens there are, which can be fewer than were asked for."""
        return self.sequences.numel()


def data_dir() -> Path | None:
    """The folder LBLLM_DATA_DIR names, or None."""
    named = os.environ.get("LBLLM_DATA_DIR")
    return Path(named).expanduser() if named else None


def location(entry: CorpusEntry) -> str:
    """Where a catalogue corpus would be read from now: a path, a hub dataset, or what is missing."""
    local = _local(entry)
    if local is not None:
        return str(local)
    return f"hub: {entry.hub[0]}" if entry.hub else "not here: set LBLLM_DATA_DIR to a folder with it"


def parts(name: str) -> list[str]:
    """The names that a corpus is joined of by "+"; a file may have one in its own."""
    return [name] if _find(name) else name.split("+")


def check_available(name: str) -> None:
    """Raise CorpusError where a catalogue corpus that ``name`` asks for is on this machine and on the hub nowhere."""
    for one in parts(name):
        entry = next((entry for entry in CATALOGUE if entry.id == one), None)
        if entry is not None and entry.hub is None and _local(entry) is None:
            raise CorpusError(f"corpus {one} is {location(entry)}")


def load_corpus(
    name: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seq_len: int,
    tokens: int,
    part: Part = "train",
    seed: int = 0,
) -> Corpus:
    """``ceil(tokens / seq_len)`` sequences of ``part``, or all there are if those are fewer. Raises CorpusError.

    The documents are shuffled by ``seed``, joined and cut. Of a large source only the beginning is read, enough for
    what is asked. Where the tokenizer itself puts a start token first, every sequence begins with it.
    """
    wanted = -(-tokens // seq_len)
    names = parts(name)
    share = -(-wanted // len(names))
    found = [_sequences(one, tokenizer, seq_len=seq_len, wanted=share, part=part, seed=seed) for one in names]
    rounds = itertools.zip_longest(*(list(one) for one in found))
    rows = [row for turn in rounds for row in turn if row is not None]
    sequences = torch.stack(rows[:wanted])
    return Corpus(name=name, hash=sequences_hash(sequences), sequences=sequences)


def sequences_hash(sequences: Tensor) -> str:
    """SHA-256, in hex, over token ids (n, seq_len) and seq_len."""
    ids = sequences.cpu().numpy().astype("<i8")
    return hashlib.sha256(ids.tobytes() + f"|{sequences.shape[1]}".encode()).hexdigest()


def evaluation_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, limit: int | None = None
) -> Tensor:
    """Consecutive windows (n, seq_len) of a text for perplexity, the first ``limit`` of them. Raises CorpusError.

    ``text`` is a file, or "wikitext2": its test split, tokenized as one text, which is the protocol of GPTQ and its
    successors. That text is the dataset's rows joined by two line ends, where a row is a line of wiki.test.raw with its
    own line end, and a blank line is an empty row; file and hub give the same. The tokenizer's own start token, if it
    adds one, stands once at the very beginning; what doesn't fill the last window is dropped.
    """
    content = "\n\n".join(_wikitext("test")) if text == "wikitext2" else read_text(_file(text))
    ids = tokenizer(content, verbose=False)["input_ids"]
    count = len(ids) // seq_len
    if count == 0:
        raise CorpusError(
            f"{text} has {len(ids)} tokens, one window takes {seq_len}; use a longer text or a smaller --seq-len"
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that stood between documents in pretraining: the end of text, which in chat models is not the eos."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    for token in ("<|endoftext|>", "<|end_of_text|>"):
        if vocabulary.get(token) in special:
            return vocabulary[token]
    return tokenizer.eos_token_id


def _sequences(
    name: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, wanted: int, part: Part, seed: int
) -> Tensor:
    """At most ``wanted`` and at least one sequence (n, seq_len) from one corpus."""
    documents = _part(name, tokenizer, part, _CHARACTERS_PER_TOKEN * wanted * seq_len)
    random.Random(seed).shuffle(documents)
    start = _start_token(tokenizer)
    body = seq_len if start is None else seq_len - 1
    ids = array("q")
    for first in range(0, len(documents), _BATCH):
        for encoded in _encode(documents[first : first + _BATCH], tokenizer, start):
            ids.extend(encoded)
        if len(ids) >= wanted * body:
            break
    count = min(wanted, len(ids) // body)
    if count == 0:
        raise CorpusError(
            f"corpus {name}: its {part} part has {len(ids)} tokens in {len(documents)} documents, "
            f"one sequence takes {seq_len}; use a longer text or a smaller seq_len"
        )
    sequences = torch.frombuffer(ids, dtype=torch.long)[: count * body].clone().view(count, body)
    if start is not None:
        sequences = torch.cat([torch.full((count, 1), start), sequences], dim=1)
    return sequences


def _encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase, start: int | None) -> Iterator[list[int]]:
    """Each document's token ids, the document separator after them unless a chat template has framed it."""
    separator = document_separator(tokenizer)
    texts = [_render(document, tokenizer) for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for document, ids in zip(documents, encoded, strict=True):
        framed = document.templated or (document.messages and tokenizer.chat_template is not None)
        if start is not None and ids[:1] == [start]:
            ids = ids[1:]
        yield ids if framed or separator is None else [*ids, separator]


def _render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """A document as plain text: conversations through the chat template, or turn after turn where there is none."""
    text = document.text
    if document.messages and tokenizer.chat_template is None:
        text = "\n\n".join(content for _, content in document.messages)
    elif document.messages:
        messages = [{"role": role, "content": content} for role, content in document.messages]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False))
        except (TemplateError, TypeError, ValueError) as error:
            raise CorpusError(
                f"{document.place}: the model's chat template refuses this conversation: {error}"
            ) from None
    return text.encode("utf-8", "replace").decode("utf-8")


def _part(name: str, tokenizer: PreTrainedTokenizerBase, part: Part, characters: int) -> list[Document]:
    """Different documents of one part, reading no more of a large source than ``characters`` of the part call for."""
    streamed, source = _open(name, tokenizer)
    budget = int(characters / SHARES[part])
    if not streamed:
        budget = max(budget, _READ_ALWAYS)
    unique: dict[bytes, Document] = {}
    read = 0
    for document in source:
        unique.setdefault(document.digest, document)
        read += document.size
        if read >= budget:
            break
    documents = list(unique.values())
    if all(document.part != "train" for document in documents):
        # A document or two may all fall into the small parts; they are there to be trained on all the same.
        return documents if part == "train" else []
    return [document for document in documents if document.part == part]


def _open(name: str, tokenizer: PreTrainedTokenizerBase) -> tuple[bool, Iterable[Document]]:
    """Whether a corpus comes over the network, and its documents in a fixed order."""
    found = _find(name)
    if found is None:
        known = [entry.id for entry in CATALOGUE]
        close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        raise CorpusError(
            f"corpus {name!r} is not known and no file or folder has that name; "
            f"{'close names: ' + ', '.join(close) if close else 'known: ' + ', '.join(known)}"
        )
    if isinstance(found, Path):
        return False, read_documents(found)
    if found.id == "wikitext2":
        return False, wikitext_articles(_wikitext("train"), found.id)
    local = _local(found)
    if found.asset is not None:
        if local is None:
            raise CorpusError(
                f"{ASSETS / found.asset} is missing; get the project's assets again, make it with "
                "`python -m lbllm corpora sample`, or choose another corpus"
            )
        return False, _sampled(read_documents(local), tokenizer)
    if local is not None:
        return False, read_documents(local)
    if found.hub is None:
        raise CorpusError(f"corpus {name} is not here: set LBLLM_DATA_DIR to a folder that holds {found.files[0]}")
    return True, _hub_rows(*found.hub)


def _find(name: str) -> CorpusEntry | Path | None:
    """The catalogue entry, file or folder that a name means; a file also by its path under LBLLM_DATA_DIR."""
    entry = next((entry for entry in CATALOGUE if entry.id == name), None)
    if entry is not None:
        return entry
    below = data_dir()
    candidates = [Path(name).expanduser(), *([below / name] if below else [])]
    return next((path for path in candidates if name and path.exists()), None)


def _file(name: str) -> Path:
    found = _find(name)
    if isinstance(found, Path) and found.is_file():
        return found
    raise CorpusError(f"text {name!r} is neither wikitext2 nor a file")


def _local(entry: CorpusEntry) -> Path | None:
    if entry.asset is not None:
        path = ASSETS / entry.asset
        return path if path.is_file() else None
    below = data_dir()
    paths = [below / file for file in entry.files] if below else []
    return next((path for path in paths if path.exists()), None)


def _wikitext(split: str) -> list[str]:
    """The rows of a WikiText-2 split, the same from a local file and from the hub."""
    below = data_dir()
    names = [f"wiki.{split}.raw"] + (["wiki.train.head.raw.txt"] if split == "train" else [])
    for name in names:
        path = below / "wikitext-2-raw" / name if below else None
        if path is not None and path.is_file():
            return wikitext_rows(read_lines(path))
    return [row["text"] for row in hub_dataset("Salesforce/wikitext", "wikitext-2-raw-v1", split, streaming=False)]


def _hub_rows(dataset: str, configuration: str | None) -> Iterator[Document]:
    rows = iter(hub_dataset(dataset, configuration, "train", streaming=True))
    for number in itertools.count(1):
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # whatever the network and the file formats below raise
            raise CorpusError(f"reading {dataset} from the hub broke off at row {number}: {error}") from error
        yield from parse_row(row, f"{dataset}, row {number}")


def hub_dataset(dataset: str, configuration: str | None, split: str, *, streaming: bool) -> Any:
    if hub.ask(dataset, "dataset") == "unreachable":
        raise CorpusError(_NO_HUB.format(dataset, "it does not answer"))
    import datasets  # seconds to import, and only needed here

    try:
        return datasets.load_dataset(dataset, configuration, split=split, streaming=streaming)
    except Exception as error:  # whatever the network and the hub's client raise
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise CorpusError(_NO_HUB.format(dataset, reason)) from error


def _sampled(documents: Iterable[Document], tokenizer: PreTrainedTokenizerBase) -> Iterator[Document]:
    """A corpus of the embedded model for any tokenizer: as it is for that model's own, else without its chat markup.

    For another model the turns of a conversation go through its own template, and a row of documents is taken apart.
    """
    rows = list(documents)
    head = None
    if tokenizer.chat_template is not None:
        rendered = str(tokenizer.apply_chat_template([{"role": "user", "content": "QUESTION"}], tokenize=False))
        head = rendered.split("QUESTION")[0]
    chats = [row.text.startswith("<|im_start|>") for row in rows]
    own = head is not None and any(row.text.startswith(head) for row, chat in zip(rows, chats, strict=True) if chat)
    for row, chat in zip(rows, chats, strict=True):
        if own:
            yield replace(row, templated=chat)
        elif chat:
            for talk in row.text.split("<|im_start|>system\n"):
                turns = re.findall(r"<\|im_start\|>(user|assistant)\n(.*?)(?:<\|im_end\|>|\Z)", talk, re.DOTALL)
                if turns:
                    yield Document(messages=tuple(turns), place=row.place)
        else:
            for text in re.split(r"(?:<\|im_end\|>|<\|endoftext\|>|<\|im_start\|>(?:\w+\n)?)+", row.text):
                yield from sections(text, row.place)


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer by itself puts before every text, or None."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
