"""Write a tokenizer as llama.cpp reads it: byte-level BPE, or a SentencePiece vocabulary with bytes.

A GGUF file doesn't contain the rule that splits a text before byte-level merges, only the name of one of llama.cpp's
rules, so tokenizers with other rules are refused. A SentencePiece vocabulary is first tried on texts: llama.cpp's own
rule (``lbllm.share.sentencepiece``) must split them as the tokenizer does.
"""

from __future__ import annotations

import json
from typing import Any

import gguf
from transformers import PreTrainedTokenizerBase
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS

from lbllm.errors import ModelError
from lbllm.models.chat_template import render
from lbllm.share.gguf_models import OTHERWISE
from lbllm.share.sentencepiece import SPACE, Splitter, byte_token, scores

_SPLITS = {GGUF_PRE_TOKENIZER_SPLITS[name]: name for name in ("llama-bpe", "qwen2", "tekken")}
# What a vocabulary is tried on. No text begins with a space: there llama.cpp has one more than some tokenizers, which
# makes no other difference.
_TRIED = (
    "The river runs past the old mill, and under the stone bridge.",
    "two spaces  three   four    and a tab\there;\nnew line\n\nempty line\n\n\nend ",
    "Äpfel, garçon, straße; Ελληνικά, русский, עברית, العربية, हिन्दी, 東京の空, 한국어.",
    "def f(x):\n    return {'a': [1, 22, 333, 4444], \"b\": x ** 2.5e-3}  # 100%\r\n",
    "🙂👩‍👩‍👧 ∑∫√ … — “quoted” ‘text’ €50 \u00a0\u200b\u2581",
    "https://example.org/path?query=1&other=two#part A.B.C. aaaaaaaaa ----- =====",
    "x",
)
# In models with one of these in their name llama.cpp lets special tokens take the white space after them, but for three
# that it takes for granted.
_PHI, _KEPT = ("phi-3", "phi3"), ("<unk>", "<s>", "<|endoftext|>")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> None:
    """Raise ModelError, with a way out, if llama.cpp can't split texts as this tokenizer does. ``name``: of the model
    in the file."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    vocabulary = tokenizer.get_vocab()
    if _is_phi(name) and not all(token in vocabulary for token in _KEPT):
        raise ModelError(f"llama.cpp reads {name} only with the tokens {', '.join(_KEPT)}; {OTHERWISE}")
    if _is_sentencepiece(document):
        _prefix(tokenizer, document, name)
    else:
        _pre_tokenizer(document)


def add_tokenizer(
    writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, *, rows: int, ends: list[int], name: str
) -> None:
    """Write the vocabulary of a model with ``rows`` embeddings, its special tokens and its chat template. ``ends``: the
    tokens that end an answer; a file has the tokenizer's own one and up to two others."""
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    pieces = _is_sentencepiece(document)
    tokens = [f"[PAD{number}]" for number in range(rows)]  # rows that no token uses
    types = [gguf.TokenType.UNUSED] * rows
    for token, number in tokenizer.get_vocab().items():
        if number < rows:
            tokens[number], types[number] = token, gguf.TokenType.NORMAL
    made = scores([tuple(merge) for merge in document["model"]["merges"]])
    for added in _added(document, made) if pieces else document["added_tokens"]:
        if added["id"] < rows:
            types[added["id"]] = gguf.TokenType.CONTROL if added["special"] else gguf.TokenType.USER_DEFINED
    if pieces:
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        for byte in range(256):
            types[document["model"]["vocab"][byte_token(byte)]] = gguf.TokenType.BYTE
        if document["model"]["unk_token"] in document["model"]["vocab"]:
            types[document["model"]["vocab"][document["model"]["unk_token"]]] = gguf.TokenType.UNKNOWN
        writer.add_add_space_prefix(_prefix(tokenizer, document, name))
        writer.add_token_scores([made.get(token, 0.0) for token in tokens])
    else:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(_pre_tokenizer(document))
        writer.add_token_merges([" ".join(merge) for merge in document["model"]["merges"]])
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    _add_special(writer, tokenizer, rows, ends)
    template = tokenizer.chat_template
    if isinstance(template, dict):  # several by name, of which llama.cpp uses the default one
        template = template.get("default")
    if template is not None:
        writer.add_chat_template(template)


def begins_with_start(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether llama.cpp puts the token that starts a text before every text."""
    return bool(tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id)


def _add_special(writer: gguf.GGUFWriter, tokenizer: PreTrainedTokenizerBase, rows: int, ends: list[int]) -> None:
    own = tokenizer.eos_token_id
    others = [number for number in ends if number != own]
    if own is None and others:
        own = others.pop(0)
    numbers = {
        writer.add_bos_token_id: tokenizer.bos_token_id,
        writer.add_eos_token_id: own,
        writer.add_unk_token_id: tokenizer.unk_token_id,
        writer.add_pad_token_id: tokenizer.pad_token_id,
        writer.add_eot_token_id: others[0] if others else None,
        writer.add_eom_token_id: others[1] if others[1:] else None,
    }
    for add, number in numbers.items():
        if number is not None and number < rows:
            add(number)
    writer.add_add_bos_token(begins_with_start(tokenizer))
    writer.add_add_eos_token(tokenizer("a")["input_ids"][-1] == tokenizer.eos_token_id)


def _pre_tokenizer(document: dict[str, Any]) -> str:
    """llama.cpp's name for how a tokenizer.json splits texts. Raises ModelError if it is not known here."""
    normalizer, model = document["normalizer"], document["model"]
    steps = _steps(document["pre_tokenizer"], "pretokenizers")
    kinds = [step.get("type") for step in steps]
    bytes_only = model["type"] == "BPE" and kinds[-1:] == ["ByteLevel"] and not steps[-1]["add_prefix_space"]
    if bytes_only and (normalizer is None or normalizer["type"] == "NFC"):
        by_pattern = steps[-1]["use_regex"]
        if kinds == ["ByteLevel"] and by_pattern:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and by_pattern and steps[0]["individual_digits"]:
            return "smollm"
        pattern = steps[0].get("pattern", {}).get("Regex")
        isolated = kinds == ["Split", "ByteLevel"] and not by_pattern and steps[0]["behavior"] == "Isolated"
        if isolated and not steps[0]["invert"] and pattern in _SPLITS:
            return _SPLITS[pattern]
    raise _refused(document)


def _is_sentencepiece(document: dict[str, Any]) -> bool:
    """Whether a tokenizer.json is a SentencePiece vocabulary of type BPE, with a token for each byte, and changes a
    text before it is split in no other way than spaces."""
    model = document["model"]
    if model["type"] != "BPE" or not model["byte_fallback"] or model["ignore_merges"]:
        return False
    if not all(byte_token(byte) in model["vocab"] for byte in range(256)):
        return False
    spaces = {"String": " "}
    changes = [
        (step["type"] == "Prepend" and step["prepend"] == SPACE)
        or (step["type"] == "Replace" and (step["pattern"], step["content"]) == (spaces, SPACE))
        for step in _steps(document["normalizer"], "normalizers")
    ]  # fmt: skip
    cuts = [
        (step["type"] == "Metaspace" and step["replacement"] == SPACE)
        or (step["type"] == "Split" and step["pattern"] == spaces)
        for step in _steps(document["pre_tokenizer"], "pretokenizers")
    ]  # fmt: skip
    return all(changes) and all(cuts) and bool(changes or cuts)


def _prefix(tokenizer: PreTrainedTokenizerBase, document: dict[str, Any], name: str) -> bool:
    """Whether llama.cpp must put a space before a text, to split it as this SentencePiece vocabulary. Raises ModelError
    if it would split a text in another way either way."""
    model = document["model"]
    made = scores([tuple(merge) for merge in model["merges"]])
    added = {one["content"]: one for one in _added(document, made)}
    stripped = {one for one, entry in added.items() if _is_phi(name) and entry["special"] and one not in _KEPT}
    ids = model["vocab"] | {one: entry["id"] for one, entry in added.items()}
    chats = _chats(tokenizer)
    wrong: list[str] = []
    # A vocabulary that puts a space only before the first word of all suits llama.cpp in chats alone.
    for texts, prefix in ((texts, prefix) for texts in ((*_TRIED, *chats), chats) for prefix in (True, False) if texts):
        splitter = Splitter(ids, made, list(added), frozenset(stripped), prefix)
        split = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        wrong = [text for text, wanted in zip(texts, split, strict=True) if splitter.split(text) != wanted]
        if not wrong:
            return prefix
    raise ModelError(
        f"llama.cpp would split texts in another way than this model's tokenizer, for example {wrong[0]!r}; {OTHERWISE}"
    )


def _is_phi(name: str) -> bool:
    return any(part in name.lower() for part in _PHI)


def _chats(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Prompts of chats in the tokenizer's chat template, if it has one."""
    if tokenizer.chat_template is None:
        return ()
    first, answer, second = (
        {"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), _TRIED, strict=False)
    )
    chats = ([first], [first, answer, second])
    return tuple(render(tokenizer, chat, add_generation_prompt=True) for chat in chats)


def _added(document: dict[str, Any], made: dict[str, float]) -> list[dict[str, Any]]:
    """The tokens that are found in a text before a SentencePiece vocabulary splits it: the added ones, but for runs of
    spaces, which merges make as well."""
    return [one for one in document["added_tokens"] if SPACE not in one["content"] or one["content"] not in made]


def _steps(part: dict[str, Any] | None, inner: str) -> list[dict[str, Any]]:
    """The steps of a normalizer or a pre-tokenizer, which may be a sequence of them."""
    if part is None:
        return []
    steps: list[dict[str, Any]] = part[inner] if part["type"] == "Sequence" else [part]
    return steps


def _refused(document: dict[str, Any]) -> ModelError:
    normalizers = [step["type"] for step in _steps(document["normalizer"], "normalizers")]
    kinds = [step["type"] for step in _steps(document["pre_tokenizer"], "pretokenizers")]
    made_of = ", ".join([document["model"]["type"], *normalizers, *kinds])
    return ModelError(f"this model's tokenizer ({made_of}) is not written as GGUF here; {OTHERWISE}")
