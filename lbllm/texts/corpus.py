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

import hashlib
import itertools
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lbllm.config import setting_name
from lbllm.errors import CorpusError
from lbllm.texts.catalogue import parts
from lbllm.texts.documents import SHARES, Document, Part
from lbllm.texts.sources import open_text

# How much of a source is read for a number of tokens: texts have 4 to 5 characters a token, so 8 leave room to spare.
_CHARACTERS_PER_TOKEN = 8
_READ_ALWAYS = 64_000_000
_BATCH = 128


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
            f"one sequence takes {seq_len}; use a longer text or lower {setting_name('seq_len')}"
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
    streamed, source = open_text(name, tokenizer)
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


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token that the tokenizer by itself puts before every text, or None."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
