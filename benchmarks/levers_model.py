"""What the trials of ``benchmarks.levers`` share: a teacher, states of its binarized blocks, and how a model of them is
judged."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from lbllm.files import new_file
from lbllm.machine import make_accelerator
from lbllm.measure.perplexity import divergence
from lbllm.models.blocks import decoder_blocks, share_copy
from lbllm.models.teacher import Teacher
from lbllm.pipeline.packed_model import packed_block
from lbllm.quant.plan import block_formats
from lbllm.quant.training_layer import BinaryLinear
from lbllm.sections import QuantConfig
from lbllm.stages.block_state import restore
from lbllm.stages.distill import binary_layers
from lbllm.texts.corpus import load_corpus

# Of one block: the tensors that ``block_state.collect`` gives, and the latent weights.
State = dict[str, Tensor]
TAIL = 3  # steps of an activation's tail: nothing reads them here, where activations keep 16 bits


@dataclass(frozen=True)
class Text:
    """Where training text comes from; each seed takes other documents, and the order of them."""

    corpus: str
    seq_len: int

    def sequences(self, teacher: Teacher, tokens: int, seed: int) -> Tensor:
        """Token ids (n, seq_len) of the train part, in another order than a run's own."""
        made = load_corpus(self.corpus, teacher.tokenizer, seq_len=self.seq_len, tokens=tokens, seed=1_000 + seed)
        return made.sequences


class Bench:
    """A teacher and its format, weights alone, with the texts that models are judged on, by name: windows (n, T)."""

    def __init__(self, teacher: Teacher, quant: QuantConfig, judged: dict[str, Tensor], device: str = "cpu") -> None:
        self.teacher, self.quant, self.judged = teacher, quant.weights_only(), judged
        _, self.blocks, self.formats = block_formats(teacher.model, self.quant)
        self.device = device

    @cached_property
    def autocast(self) -> Any:
        """The precision of matrix products, as a run on this machine has it."""
        return make_accelerator(self.device).autocast

    def restored(self, states: list[State]) -> Iterator[nn.Module]:
        """The binarized blocks of states, frozen; the latent weights are left out."""
        for number, state in enumerate(states):
            yield restore(self.blocks[number], self.formats[number], state, TAIL)

    def student(self, states: list[State]) -> tuple[PreTrainedModel, list[BinaryLinear]]:
        """A model to train whose first blocks are those of ``states``, and its binarized layers in order."""
        model: PreTrainedModel = share_copy(self.teacher.model)
        blocks = decoder_blocks(model)[1]
        layers: list[BinaryLinear] = []
        for number, block in enumerate(self.restored(states)):
            blocks[number] = block
            layers += binary_layers(block).values()
        return model, layers

    def judge(self, states: list[State]) -> dict[str, float]:
        """KL to the teacher and perplexity on each text of the model whose first blocks are packed from ``states``."""
        return self.judge_blocks([packed_block(block, TAIL, torch.float32) for block in self.restored(states)])

    def judge_blocks(self, first: Sequence[nn.Module]) -> dict[str, float]:
        """KL to the teacher and perplexity on each text of the teacher with other first blocks."""
        model: PreTrainedModel = share_copy(self.teacher.model)
        blocks = decoder_blocks(model)[1]
        for number, block in enumerate(first):
            blocks[number] = block
        found: dict[str, float] = {}
        for name, windows in self.judged.items():
            one = divergence(self.teacher.model, model.eval(), windows)
            found |= {f"kl_{name}": one.kl, f"perplexity_{name}": one.student_perplexity}
        return found


def save_states(path: Path, states: list[State]) -> None:
    """Write states of blocks to one file, atomically."""
    named = {
        f"{number}/{name}": tensor.detach().contiguous()
        for number, state in enumerate(states)
        for name, tensor in state.items()
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path) as file:
        save_file(named, file)


def load_states(path: Path) -> list[State]:
    """Read what ``save_states`` wrote."""
    states: dict[int, State] = {}
    for name, tensor in load_file(path).items():
        number, _, key = name.partition("/")
        states.setdefault(int(number), {})[key] = tensor
    return [states[number] for number in sorted(states)]


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self.began = time.perf_counter()

    def seconds(self) -> float:
        return round(time.perf_counter() - self.began, 1)
