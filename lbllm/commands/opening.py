"""Open what a command line names: models, devices, texts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lbllm.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

WINDOW = 2048
CATALOGUE_WINDOWS = 100


def open_model(name: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A packed checkpoint's folder, or any teacher. Raises ModelError, CheckpointError."""
    from lbllm.checkpoints.hf import is_checkpoint, load
    from lbllm.models.teacher import load_teacher

    if is_checkpoint(name):
        return load(name, device=device_named(device))
    teacher = load_teacher(name, device=device_named(device))
    return teacher.model, teacher.tokenizer


def device_named(name: str) -> str:
    """The device that --device means. Raises ConfigError where there is none such."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"--device {name!r} is not a device; use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"--device {name}: no CUDA device is visible here; use cpu")
    return name


def windows(
    text: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seq_len: int | None, limit: int | None
) -> Tensor:
    """Windows (n, T) of the text to evaluate on. Raises ConfigError, CorpusError."""
    from lbllm.models.blocks import check_length, context_length
    from lbllm.texts.catalogue import TEXTS
    from lbllm.texts.corpus import load_corpus
    from lbllm.texts.windows import evaluation_tokens

    length = seq_len or min(WINDOW, context_length(model) or WINDOW)
    check_length(model, length, "--seq-len")
    if text != "wikitext2" and text in (entry.id for entry in TEXTS):
        wanted = (limit or CATALOGUE_WINDOWS) * length
        return load_corpus(text, tokenizer, seq_len=length, tokens=wanted, part="heldout").sequences
    return evaluation_tokens(text, tokenizer, seq_len=length, limit=limit)
