"""Tokens that a tokenizer makes must have a row in the model's embeddings."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm.errors import ModelError

_ADVICE = "put the tokenizer of the same model beside its weights, or resize its embeddings (resize_token_embeddings)"


def embedding_rows(model: PreTrainedModel) -> int:
    """The number of token ids that the model has an embedding for."""
    embeddings: Any = model.get_input_embeddings()
    return int(embeddings.weight.shape[0])


def check_tokenizer(name: str, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Raise ModelError if the tokenizer, or the chat template, puts a token into texts that has no row of ``rows``.

    Some models have added tokens without a row that no text of theirs uses, for padding. They are accepted here;
    ``check_ids`` refuses the text that has one.
    """
    if tokenizer.vocab_size > rows:
        raise ModelError(
            f"{name}: its tokenizer has {tokenizer.vocab_size} tokens, but its embeddings have {rows}; {_ADVICE}"
        )
    added = {number: str(token) for number, token in tokenizer.added_tokens_decoder.items() if number >= rows}
    if not added:
        return
    used = set(tokenizer("a")["input_ids"]) | {tokenizer.bos_token_id, tokenizer.eos_token_id}
    templates = list(_templates(tokenizer.chat_template))
    variables = {getattr(tokenizer, f"{kind}_token"): f"{kind}_token" for kind in ("pad", "unk", "sep", "cls")}
    for number, token in sorted(added.items()):
        by_template = any(token in text or (variables.get(token) or token) in text for text in templates)
        if number in used or by_template:
            place = "its chat template" if by_template else "its tokenizer"
            raise ModelError(
                f"{name}: {place} uses the token {token!r} with id {number}, but its embeddings have {rows} rows; "
                f"{_ADVICE}"
            )


def check_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, ids: Tensor) -> None:
    """Raise ModelError, with the token, if token ids (...) have no row in the model's embeddings."""
    rows = embedding_rows(model)
    if ids.numel() and int(ids.max()) >= rows:
        number = int(ids.max())
        raise ModelError(
            f"the text has the token {tokenizer.convert_ids_to_tokens(number)!r} with id {number}, but the model's "
            f"embeddings have {rows} rows; remove it from the text, or {_ADVICE}"
        )


def _templates(stated: object) -> Iterator[str]:
    if isinstance(stated, dict):
        for inner in stated.values():
            yield from _templates(inner)
    elif isinstance(stated, str):
        yield stated
