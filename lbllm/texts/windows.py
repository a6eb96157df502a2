"""Cut a text into consecutive windows, to measure perplexity."""

from __future__ import annotations

import logging
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.errors import CorpusError
from lbllm.json_input import replaced
from lbllm.models.blocks import check_length, context_length
from lbllm.texts.catalogue import TEXTS, find_text
from lbllm.texts.corpus import load_corpus
from lbllm.texts.documents import check_format, read_beginning
from lbllm.texts.sources import wikitext_rows_of
from lbllm.units import rows_left_out, size

WINDOW = 2048  # tokens
CATALOGUE_WINDOWS = 100  # of a catalogue text, which has no end of its own
# What is read of a file: at most the first number of characters, and for a few windows at least the second.
LONGEST, SHORTEST = 64_000_000, 4_000_000
_CHARACTERS_PER_TOKEN = 16

_LOG = logging.getLogger(__name__)


def check_text(text: str, limit: int | None) -> None:
    """Raise CorpusError, before a model is loaded, for a text that ``evaluation_windows`` would refuse by its name,
    its format or its size."""
    if text in (entry.id for entry in TEXTS):
        return
    path = _file(text)
    if limit is None and path.stat().st_size > 4 * LONGEST:  # a character has at most four bytes
        raise CorpusError(_too_long(path))


def _too_long(path: Path) -> str:
    return (
        f"{path} has {size(path.stat().st_size)}, more than the {LONGEST / 1e6:.0f} million characters that are read "
        f"of a text, some {LONGEST / 4e6:.0f} million tokens; give --limit to evaluate its first windows"
    )


def evaluation_windows(
    text: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seq_len: int | None = None,
    limit: int | None = None,
) -> Tensor:
    """Windows (n, T) of token ids to evaluate a model on, the first ``limit`` of them: of wikitext2, of a file, or of
    the held-out part of a catalogue text.

    ``seq_len``: T, by default 2048, or the model's context if that is shorter. Raises ConfigError, CorpusError.
    """
    length = seq_len or min(WINDOW, context_length(model) or WINDOW)
    check_length(model, length, "--seq-len")
    if text != "wikitext2" and text in (entry.id for entry in TEXTS):
        wanted = (limit or CATALOGUE_WINDOWS) * length
        return load_corpus(text, tokenizer, seq_len=length, tokens=wanted, part="heldout").sequences
    return evaluation_tokens(text, tokenizer, seq_len=length, limit=limit)


def evaluation_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, limit: int | None = None
) -> Tensor:
    """Return the first ``limit`` windows of a text: int64 token ids (n, seq_len). Raises CorpusError.

    ``text`` is a file, or "wikitext2": its test split, tokenized as one text, which is the protocol of GPTQ and later
    papers. This text is the dataset's rows, joined by two line ends. A row is a line of wiki.test.raw with its line
    end; a blank line is an empty row. File and hub give the same text. If the tokenizer adds a start token, it appears
    once, at the beginning of the text. Tokens that don't fill the last window are dropped.
    """
    if text == "wikitext2":
        ids = _ids("\n\n".join(wikitext_rows_of("test")), tokenizer)
    else:
        ids = _file_ids(_file(text), tokenizer, None if limit is None else limit * seq_len)
    count = len(ids) // seq_len
    if count == 0:
        raise CorpusError(
            f"{text} has {len(ids)} tokens, one window needs {seq_len}; use a longer text or a smaller --seq-len"
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)


def _file_ids(path: Path, tokenizer: PreTrainedTokenizerBase, wanted: int | None) -> list[int]:
    """The token ids of a file; where only the first ``wanted`` are needed, perhaps only of its beginning."""
    characters = LONGEST if wanted is None else min(LONGEST, max(SHORTEST, _CHARACTERS_PER_TOKEN * wanted))
    read = read_beginning(path, characters)
    if wanted is None and not read.whole:
        raise CorpusError(_too_long(path))
    ids = _ids(read.text, tokenizer)
    if wanted is not None and len(ids) < wanted and not read.whole:
        read = read_beginning(path, LONGEST)
        ids = _ids(read.text, tokenizer)
        if len(ids) < wanted and not read.whole:
            raise CorpusError(
                f"{path}: the first {LONGEST / 1e6:.0f} million characters, which are read of a text, have "
                f"{len(ids):,} tokens, --limit needs {wanted:,}; give a smaller --limit"
            )
    if read.left_out:
        _LOG.warning("%s: %s", path, rows_left_out(read.left_out))
    return ids


def _ids(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids: list[int] = tokenizer(replaced(text), verbose=False)["input_ids"]
    return ids


def _file(name: str) -> Path:
    found = find_text(name)
    if isinstance(found, Path) and found.is_file():
        check_format(found)
        return found
    raise CorpusError(f"text {name!r} is not a file; give a file or wikitext2")
