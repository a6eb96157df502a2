"""Make fixed token tensors, with a hash, from catalogue corpora, files and folders.

    load_corpus("embedded", tokenizer, seq_len=512, tokens=32_768)                      catalogue
    load_corpus("notes/", tokenizer, seq_len=512, tokens=32_768, part="heldout")        .txt and .jsonl(.gz) files
    load_corpus("embedded+wikipedia", tokenizer, seq_len=512, tokens=32_768)            equal shares
    evaluation_tokens("wikitext2", tokenizer, seq_len=2048, limit=None)                 consecutive windows

The hash of a document decides whether it is in the train, tune or held-out part, so the same text is never in two
parts. There is no padding: documents are joined, with the tokenizer's document separator between them, and cut into
sequences.
"""

from __future__ import annotations

import hashlib
import itertools
import random
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lbllm.config import setting_name
from lbllm.errors import CorpusError, ModelError
from lbllm.json_input import replaced
from lbllm.models.chat_template import render
from lbllm.texts.catalogue import CorpusEntry, find_text, local_path, parts
from lbllm.texts.documents import SHARES, Document, Part
from lbllm.texts.sources import open_text
from lbllm.units import rows_left_out, size

# Characters to read from a source for each token: texts have 4 to 5 characters per token, so 8 are enough.
_CHARACTERS_PER_TOKEN = 8
_READ_ALWAYS = 64_000_000
_BATCH = 128


@dataclass(frozen=True)
class Corpus:
    """``sequences``: int64 token ids (n, seq_len). ``hash``: SHA-256 over them and seq_len. ``left_out``: rows without
    text among those that were read."""

    name: str
    hash: str
    sequences: Tensor
    left_out: int = 0

    @property
    def tokens(self) -> int:
        """The number of tokens; it can be smaller than the number requested."""
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
    """Return ``ceil(tokens / seq_len)`` sequences of ``part``, or fewer if the part is too short. Raises CorpusError.

    The documents are shuffled by ``seed``, joined and cut. It reads only the beginning of a large source, enough for
    the requested tokens. If the tokenizer adds a start token to texts, every sequence begins with it.
    """
    wanted = -(-tokens // seq_len)
    names = parts(name)
    share = -(-wanted // len(names))
    found = [_sequences(one, tokenizer, seq_len=seq_len, wanted=share, part=part, seed=seed) for one in names]
    rounds = itertools.zip_longest(*(list(one) for one, _ in found))
    rows = [row for turn in rounds for row in turn if row is not None]
    sequences = torch.stack(rows[:wanted])
    return Corpus(name, sequences_hash(sequences), sequences, sum(left_out for _, left_out in found))


def reading_note(name: str, tokens: int) -> str | None:
    """A sentence for each text on this machine of which a run on ``tokens`` reads only the beginning; None if there is
    no such text. Only sizes are looked at."""
    said = []
    for one in parts(name):
        found = find_text(one)
        path = local_path(found) if isinstance(found, CorpusEntry) else found
        budget = _budget("train", _CHARACTERS_PER_TOKEN * tokens, streamed=False)
        if path is not None and path.is_file() and path.stat().st_size > budget:
            said.append(
                f"{path} has {size(path.stat().st_size)}. Only its first {budget / 1e6:,.0f} million characters are "
                f"read, enough for {tokens:,} tokens; give a shorter file to choose others"
            )
    return "\n".join(said) or None


def sequences_hash(sequences: Tensor) -> str:
    """Return the SHA-256, in hex, of token ids (n, seq_len) and seq_len."""
    ids = sequences.cpu().numpy().astype("<i8")
    return hashlib.sha256(ids.tobytes() + f"|{sequences.shape[1]}".encode()).hexdigest()


def document_separator(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that separated documents in pretraining: the end of text, in chat models not the eos."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_ids)
    for token in ("<|endoftext|>", "<|end_of_text|>"):
        if vocabulary.get(token) in special:
            return vocabulary[token]
    return tokenizer.eos_token_id


def _sequences(
    name: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, wanted: int, part: Part, seed: int
) -> tuple[Tensor, int]:
    """Return at least one and at most ``wanted`` sequences (n, seq_len) of one corpus, and the number of rows without
    text that were left out. Raises CorpusError."""
    documents, left_out = _part(name, tokenizer, part, _CHARACTERS_PER_TOKEN * wanted * seq_len)
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
        without = f" ({rows_left_out(left_out)})" if left_out else ""
        raise CorpusError(
            f"corpus {name}: its {part} part has {len(ids)} tokens in {len(documents)} documents{without}, "
            f"one sequence needs {seq_len}; use a longer text or lower {setting_name('seq_len')}"
        )
    sequences = torch.frombuffer(ids, dtype=torch.long)[: count * body].clone().view(count, body)
    if start is not None:
        sequences = torch.cat([torch.full((count, 1), start), sequences], dim=1)
    return sequences, left_out


def _encode(documents: list[Document], tokenizer: PreTrainedTokenizerBase, start: int | None) -> Iterator[list[int]]:
    """Yield each document's token ids, followed by the document separator unless a chat template formatted it."""
    separator = document_separator(tokenizer)
    texts = [_render(document, tokenizer) for document in documents]
    encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
    for document, ids in zip(documents, encoded, strict=True):
        framed = document.templated or (document.messages and tokenizer.chat_template is not None)
        if start is not None and ids[:1] == [start]:
            ids = ids[1:]
        yield ids if framed or separator is None else [*ids, separator]


def _render(document: Document, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a document as plain text; a conversation goes through the chat template, or its turns are joined."""
    text = document.text
    if document.messages and tokenizer.chat_template is None:
        text = "\n\n".join(content for _, content in document.messages)
    elif document.messages:
        messages = [{"role": role, "content": content} for role, content in document.messages]
        try:
            text = render(tokenizer, messages)
        except ModelError as error:
            raise CorpusError(f"{document.place}: {error}") from None
    return replaced(text)


def _part(name: str, tokenizer: PreTrainedTokenizerBase, part: Part, characters: int) -> tuple[list[Document], int]:
    """Return the distinct documents of one part, and how many rows without text were left out; stop reading a large
    source after about ``characters`` of the part."""
    streamed, source = open_text(name, tokenizer)
    budget = _budget(part, characters, streamed=streamed)
    unique: dict[bytes, Document] = {}
    read = left_out = 0
    for document in source:
        if document.empty:
            left_out += 1
            continue
        unique.setdefault(document.digest, document)
        read += document.size
        if read >= budget:
            break
    documents = list(unique.values())
    if all(document.part != "train" for document in documents):
        # With only one or two documents, all may belong to the small parts; the train part then takes them all.
        return (documents if part == "train" else []), left_out
    return [document for document in documents if document.part == part], left_out


def _budget(part: Part, characters: int, *, streamed: bool) -> int:
    """How many characters of a source are read for ``characters`` of a part; of a file always the same beginning."""
    budget = int(characters / SHARES[part])
    return budget if streamed else max(budget, _READ_ALWAYS)


def _start_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token that the tokenizer adds before every text, or None."""
    first = tokenizer("a")["input_ids"][:1]
    return tokenizer.bos_token_id if first == [tokenizer.bos_token_id] else None
