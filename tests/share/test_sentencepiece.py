"""SentencePiece vocabularies: llama.cpp's rule with the scores of the file splits as the tokenizers library does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader, TokenType
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lbllm.errors import ModelError
from lbllm.share.gguf import check_exportable, write_gguf
from lbllm.share.sentencepiece import SPACE, Splitter, byte_token, scores
from tests.helpers.cases import cases
from tests.helpers.tiny_models import CHAT_TEMPLATE, SENTENCES, tiny, tiny_config, tiny_tokenizer

SPECIAL = ("<unk>", "<s>", "<|endoftext|>", "</s>", "<|user|>", "<|end|>")


def made(*, prefix: bool = True, form: str = "normalizer", strips: bool = False) -> PreTrainedTokenizerBase:
    """A small SentencePiece vocabulary with a token for each byte, as tokenizer.json files have it.
    ``strips``: special tokens but the first three take the white space after them, as Phi 3's."""
    spaces = [normalizers.Replace(" ", SPACE)]
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    trained.train_from_iterator(SENTENCES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    tokens = [*SPECIAL, *(byte_token(byte) for byte in range(256)), *model["vocab"], "\n"]
    vocab = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    # All pairs of tokens that make a token follow each other, as in a list made from a SentencePiece model.
    order = list(dict.fromkeys("".join(merge) for merge in model["merges"]))
    pairs = [(token[:cut], token[cut:]) for token in order for cut in range(1, len(token))]
    merges = [pair for pair in pairs if vocab.keys() >= set(pair)]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    if form == "metaspace":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always" if prefix else "never", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE)] * prefix + spaces)
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    stripping = SPECIAL[3:] if strips else ()
    tokenizer.add_special_tokens(
        [AddedToken(token, normalized=False, rstrip=token in stripping) for token in SPECIAL]
    )  # fmt: skip
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    fast.chat_template = CHAT_TEMPLATE.replace("<|start|>", "<|user|>")
    return fast


TEXTS = st.text(st.sampled_from("aeiotrnsh THE.,\n\tüß東🙂0123▁"), max_size=40) | st.text(max_size=10)


@cases(20)
@given(texts=st.lists(TEXTS | st.sampled_from(SENTENCES), min_size=1, max_size=4), prefix=st.booleans())
def test_llama_cpp_s_rule_splits_alike(texts: list[str], prefix: bool) -> None:
    tokenizer = MADE[prefix]
    document = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    rule = Splitter(
        document["vocab"], scores([tuple(merge) for merge in document["merges"]]), SPECIAL, prefix=prefix
    )  # fmt: skip
    text = "<|end|>".join(texts)
    assert rule.split(text) == tokenizer(text, add_special_tokens=False)["input_ids"]


MADE = {prefix: made(prefix=prefix) for prefix in (True, False)}


def test_white_space_after_a_special_token() -> None:
    document = json.loads(MADE[False].backend_tokenizer.to_str())["model"]
    merges = scores([tuple(merge) for merge in document["merges"]])
    rule = Splitter(document["vocab"], merges, SPECIAL, frozenset({"<|end|>"}))
    assert rule.split("a<|end|>\n\n b<|user|>\n") == rule.split("a<|end|>b<|user|>\n")


@pytest.mark.parametrize(("form", "prefix"), [("normalizer", True), ("normalizer", False), ("metaspace", True)])
def test_the_file_has_pieces_with_scores(form: str, prefix: bool, tmp_path: Path) -> None:
    tokenizer = made(prefix=prefix, form=form)
    model, _ = tiny("llama", vocab_size=len(tokenizer) + 3)
    write_gguf(model.bfloat16(), tokenizer, tmp_path / "m.gguf", name="Tiny", licence=None)
    value = {name: field.contents() for name, field in GGUFReader(tmp_path / "m.gguf").fields.items()}
    assert value["tokenizer.ggml.model"] == "llama"
    assert value["tokenizer.ggml.add_space_prefix"] is prefix
    types, tokens = value["tokenizer.ggml.token_type"], value["tokenizer.ggml.tokens"]
    assert types[:7] == [TokenType.UNKNOWN, *[TokenType.CONTROL] * 5, TokenType.BYTE]
    assert types[-3:] == [TokenType.UNUSED] * 3
    document = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    ranks: dict[str, int] = {}
    for place, merge in enumerate(document["merges"]):
        ranks.setdefault("".join(merge), place)
    found = [value["tokenizer.ggml.scores"][tokens.index(token)] for token in sorted(ranks, key=ranks.__getitem__)]
    assert found == sorted(found, reverse=True)
    assert len(set(found)) == len(found)


def changed(tokenizer: PreTrainedTokenizerBase, **changes: Any) -> PreTrainedTokenizerBase:
    document = json.loads(tokenizer.backend_tokenizer.to_str())
    document["model"] |= changes
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(document)), eos_token="</s>")


def test_llama_cpp_strips_white_space_by_the_name_of_phi_3() -> None:
    config, phi = tiny_config("llama"), made(strips=True)
    check_exportable(config, phi, "Phi-3-mini binarized")
    for tokenizer, name in ((phi, "Mine"), (made(), "Phi-3-mini binarized")):
        with pytest.raises(ModelError, match="split texts in another way"):
            check_exportable(config, tokenizer, name)
    with pytest.raises(ModelError, match=r"reads phi3 only with the tokens <unk>, <s>, <\|endoftext\|>"):
        check_exportable(config, tiny_tokenizer(), "phi3")


def test_others_are_refused() -> None:
    config = tiny_config("llama")
    check_exportable(config, made())
    with pytest.raises(ModelError, match=r"tokenizer \(BPE, Prepend, Replace\).*dense"):
        check_exportable(config, changed(made(), byte_fallback=False))
    # llama.cpp merges whatever makes a token, so a list that lacks merges is no list of scores.
    merges = json.loads(made().backend_tokenizer.to_str())["model"]["merges"]
    with pytest.raises(ModelError, match=r"split texts in another way.*'.+'.*dense"):
        check_exportable(config, changed(made(), merges=[merge for merge in merges if len("".join(merge)) < 3]))
