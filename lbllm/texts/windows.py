"""Cut a text into consecutive windows, to measure perplexity."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.errors import CorpusError
from lbllm.models.blocks import check_length, context_length
from lbllm.texts.catalogue import TEXTS, find_text
from lbllm.texts.corpus import load_corpus
from lbllm.texts.documents import read_text
from lbllm.texts.sources import wikitext_rows_of

WINDOW = 2048  # tokens
CATALOGUE_WINDOWS = 100  # of a catalogue text, which has no end of its own


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
    content = "\n\n".join(wikitext_rows_of("test")) if text == "wikitext2" else read_text(_file(text))
    ids = tokenizer(content, verbose=False)["input_ids"]
    count = len(ids) // seq_len
    if count == 0:
        raise CorpusError(
            f"{text} has {len(ids)} tokens, one window needs {seq_len}; use a longer text or a smaller --seq-len"
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)


def _file(name: str) -> Path:
    found = find_text(name)
    if isinstance(found, Path) and found.is_file():
        return found
    raise CorpusError(f"text {name!r} is not a file; give a file or wikitext2")
