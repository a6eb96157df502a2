"""The generation settings of a chat: what a model's own settings say about ends and forbidden tokens, and nothing of
what would give other than one answer, token by token, from a growing cache."""

from __future__ import annotations

import math
from typing import Any

from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from lbllm.models.tokens import embedding_rows

_STOP_STRINGS = 64


def chat_generation(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int
) -> GenerationConfig:
    """Return the settings for one greedy answer of at most ``max_new_tokens`` tokens.

    Of the model's settings stay the ends (eos_token_id, stop_strings) and what makes tokens impossible or less likely.
    A value that can't work is left aside: it comes from a file, and the chat works without it.
    """
    rows = embedding_rows(model)
    kept = {name: value for name, value in _own(model).items() if name in _FITS and _FITS[name](value, rows)}
    if kept.get("min_new_tokens", 0) > max_new_tokens:
        del kept["min_new_tokens"]
    ends = end_ids(model, tokenizer) or None
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    return GenerationConfig(
        **kept,
        max_new_tokens=max_new_tokens,
        eos_token_id=ends,
        pad_token_id=padding if padding is not None or ends is None else ends[0],
        do_sample=False,
        num_beams=1,
        use_cache=True,
    )


def _own(model: PreTrainedModel) -> dict[str, Any]:
    return {} if model.generation_config is None else model.generation_config.to_dict()


def end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of the tokens that end an answer, from the generation settings and the tokenizer."""
    known = _own(model).get("eos_token_id")
    listed = known if isinstance(known, list) else [known]
    return sorted({token for token in [*listed, tokenizer.eos_token_id] if _is_id(token, 1 << 31)})


def stop_strings(model: PreTrainedModel) -> list[str]:
    """Return the texts that end an answer, from the generation settings."""
    stated: Any = _own(model).get("stop_strings")
    if not _are_strings(stated, 0):
        return []
    return [stated] if isinstance(stated, str) else list(stated)


def _is_id(value: Any, rows: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < rows


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _are_ids(value: Any, rows: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_is_id(one, rows) for one in value)


def _are_words(value: Any, rows: int) -> bool:
    return isinstance(value, list) and bool(value) and all(_are_ids(word, rows) for word in value)


def _are_biases(value: Any, rows: int) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(pair, list) and len(pair) == 2 for pair in value)
        and all(_are_ids(ids, rows) and _is_number(bias) for ids, bias in value)
    )


def _are_strings(value: Any, rows: int) -> bool:
    texts = [value] if isinstance(value, str) else value
    return (
        isinstance(texts, list)
        and 0 < len(texts) <= _STOP_STRINGS
        and all((isinstance(text, str) and text and text.isprintable()) or text in ("\n", "\n\n") for text in texts)
    )


def _is_decay(value: Any, rows: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == 2 and _is_id(value[0], 1 << 31) and _is_number(value[1])


def _is_count(value: Any, rows: int) -> bool:
    return _is_id(value, 1 << 20) and value > 0


_FITS = {
    "stop_strings": _are_strings,
    "suppress_tokens": _are_ids,
    "begin_suppress_tokens": _are_ids,
    "bad_words_ids": _are_words,
    "sequence_bias": _are_biases,
    "no_repeat_ngram_size": _is_count,
    "min_new_tokens": _is_count,
    "exponential_decay_length_penalty": _is_decay,
}
