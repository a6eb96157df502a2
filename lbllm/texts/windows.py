"""Consecutive windows of a text, on which perplexity is measured."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lbllm.errors import CorpusError
from lbllm.texts.catalogue import find_text
from lbllm.texts.documents import read_text
from lbllm.texts.sources import wikitext_rows_of


def evaluation_tokens(
    text: str, tokenizer: PreTrainedTokenizerBase, *, seq_len: int, limit: int | None = None
) -> Tensor:
    """Consecutive windows (n, seq_len) of a text for perplexity, the first ``limit`` of them. Raises CorpusError.

    ``text`` is a file, or "wikitext2": its test split, tokenized as one text, which is the protocol of GPTQ and its
    successors. That text is the dataset's rows joined by two line ends, where a row is a line of wiki.test.raw with its
    own line end, and a blank line is an empty row; file and hub give the same. The tokenizer's own start token, if it
    adds one, stands once at the very beginning; what doesn't fill the last window is dropped.
    """
    content = "\n\n".join(wikitext_rows_of("test")) if text == "wikitext2" else read_text(_file(text))
    ids = tokenizer(content, verbose=False)["input_ids"]
    count = len(ids) // seq_len
    if count == 0:
        raise CorpusError(
            f"{text} has {len(ids)} tokens, one window takes {seq_len}; use a longer text or a smaller --seq-len"
        )
    count = count if limit is None else min(count, limit)
    return torch.tensor(ids[: count * seq_len], dtype=torch.long).view(count, seq_len)


def _file(name: str) -> Path:
    found = find_text(name)
    if isinstance(found, Path) and found.is_file():
        return found
    raise CorpusError(f"text {name!r} is neither wikitext2 nor a file")
