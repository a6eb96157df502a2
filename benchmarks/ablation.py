"""What each choice of the three stages is worth, measured on one block of a real model.

    python -m benchmarks.ablation --block 2
    python -m benchmarks.ablation --block 14 --corpus wikipedia --stages wat

The blocks before ``--block`` stay dense but for the ``--before`` nearest ones, which stage 1 binarizes, so that the
block in question gets the inputs it would get in a run. Printed: the block's relative output error (mean over tokens
of ||teacher - student||^2 / ||teacher||^2) on the calibration text and on the corpus' tune part, which nothing is
trained on.
"""

from __future__ import annotations

import argparse
import contextlib
import time
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lbllm.activations import TrainingCache
from lbllm.blocks import (
    BlockCall,
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    linear_layers,
    run_batches,
    share_copy,
    shared_inputs,
)
from lbllm.checkpoint import collect, restore
from lbllm.config import AarConfig, LayerFormat, PtqConfig, WatConfig
from lbllm.corpora import load_corpus
from lbllm.models import load_teacher
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.ptq import ptq_block, to_layer
from lbllm.stages.wat import binary_layers, token_error, wat_block

BATCH = 4

PTQ_VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "no coordinate descent": {"sweeps": 0},
    "no alignment to the teacher's inputs": {"align": 0.0},
    "damping 0.01": {"damping": 0.01},
    "alignment damping 0.05": {"align_damping": 0.05},
}
WAT_VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "plain MSE": {"loss": "mse"},
    "relaxed bitmap, polarized": {"bitmap": "relaxed"},
    "relaxed bitmap, lambda 0": {"bitmap": "relaxed", "reg_weight": 0.0},
    "levels only": {"lr_weight": 0.0},
    "learning rates / 5": {"lr_weight": 2e-3, "lr_levels": 1e-3},
    "learning rates * 4": {"lr_weight": 4e-2, "lr_levels": 2e-2},
    "batches of 2,048 tokens": {"batch_tokens": 2_048},
}
AAR_VARIANTS: dict[str, dict[str, Any]] = {
    "as shipped": {},
    "searched knee, not trained": {"epochs": 0},
    "no tails (plain A4), trained": {"tail": 0},
    "1 step a tail": {"tail": 1},
    "2 steps a tail": {"tail": 2},
    "4 steps a tail": {"tail": 4},
    "levels not trained": {"lr_levels": 0.0},
    "knee and clips not trained": {"lr_act": 0.0},
    "KV cache in 16 bits": {"kv_bits": 16},
}


class Bench:
    """One block with its inputs and targets, on text to train on and on text to judge by."""

    def __init__(self, options: argparse.Namespace) -> None:
        teacher = load_teacher(options.model)
        _, self.blocks = decoder_blocks(teacher.model)
        self.tokens = options.tokens
        wanted: tuple[tuple[int, Literal["train", "tune"]], ...] = (
            (options.tokens, "train"),
            (options.judge_tokens, "tune"),
        )
        texts = [
            load_corpus(options.corpus, teacher.tokenizer, seq_len=options.seq_len, tokens=tokens, part=part).sequences
            for tokens, part in wanted
        ]
        self.calls: list[BlockCall] = capture_calls(teacher.model, texts[0][:1])
        self.meant = [first_inputs(teacher.model, text, BATCH) for text in texts]
        self.number = options.block
        self.format = LayerFormat(format="w1+1", group_size=options.group_size, param_bits=16, act_bits=4)
        for number in range(options.block - options.before):
            self.meant = [self.advance(self.blocks[number], hidden, number) for hidden in self.meant]
        self.seen = self.meant
        for number in range(max(0, options.block - options.before), options.block):
            tensors, _ = self.initialize(number, PtqConfig())
            student = self.student(number, tensors)
            self.seen = [self.advance(student, hidden, number) for hidden in self.seen]
            self.meant = [self.advance(self.blocks[number], hidden, number) for hidden in self.meant]
        self.targets = [self.advance(self.blocks[self.number], hidden, self.number) for hidden in self.meant]

    @torch.no_grad()
    def advance(self, block: nn.Module, hidden: Tensor, number: int, cache: Any = None) -> Tensor:
        return torch.cat(list(run_batches(block, hidden, self.calls[number], BATCH, cache)))

    def student(self, number: int, tensors: dict[str, Tensor], tail: int = 3) -> nn.Module:
        formats = dict.fromkeys(linear_layers(self.blocks[number]), self.format)
        return restore(self.blocks[number], formats, tensors, tail)

    def initialize(self, number: int, config: PtqConfig) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Stage 1: the block's tensors and its latent weights."""
        block, student = self.blocks[number], share_copy(self.blocks[number])
        formats = dict.fromkeys(linear_layers(block), self.format)
        tensors: dict[str, Tensor] = {}
        latents: dict[str, Tensor] = {}
        meant = all_inputs(block, self.meant[0], self.calls[number], BATCH)
        results = ptq_block(block, student, self.calls[number], self.seen[0], meant, formats, config, BATCH)
        for name, result in results:
            layer = to_layer(block.get_submodule(name), self.format, result)
            layer.round_params()
            tensors |= collect({name: layer})
            latents[name] = result.latent
        return tensors, latents

    def errors(self, student: nn.Module, cache: Any = None) -> list[float]:
        outputs = [self.advance(student, hidden, self.number, cache) for hidden in self.seen]
        return [float(token_error(output, target)) for output, target in zip(outputs, self.targets, strict=True)]


def report(stage: str, name: str, errors: list[float], seconds: float) -> None:
    print(f"| {stage} | {name} | {errors[0]:.5f} | {errors[1]:.5f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--block", type=int, default=2)
    parser.add_argument("--before", type=int, default=2, help="binarized blocks before the one measured")
    parser.add_argument("--tokens", type=int, default=8_192)
    parser.add_argument("--judge-tokens", type=int, default=4_096)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--stages", default="ptq,wat,aar")
    options = parser.parse_args()
    stages = options.stages.split(",")

    bench = Bench(options)
    call = bench.calls[bench.number]
    print("| stage | variant | error, trained text | error, other text | seconds |\n| --- | --- | --- | --- | --- |")
    tensors, latents = bench.initialize(bench.number, PtqConfig())
    for name, values in PTQ_VARIANTS.items() if "ptq" in stages else ():
        began = time.perf_counter()
        variant, _ = bench.initialize(bench.number, PtqConfig(**values))
        report("1", name, bench.errors(bench.student(bench.number, variant)), time.perf_counter() - began)
    trained = tensors
    for name, values in WAT_VARIANTS.items():
        if "wat" not in stages and name != "as shipped":
            continue
        began = time.perf_counter()
        student = bench.student(bench.number, tensors)
        config = WatConfig(**values)
        steps = wat_block(
            student, call, bench.seen[0], bench.targets[0], latents, config, seed=0, autocast=contextlib.nullcontext
        )
        for _ in steps:
            pass
        for layer in binary_layers(student).values():
            layer.round_params()
        if name == "as shipped":
            trained = collect(binary_layers(student))
        report("2", name, bench.errors(student), time.perf_counter() - began)
    for name, values in AAR_VARIANTS.items() if "aar" in stages else ():
        began = time.perf_counter()
        values = dict(values)
        tail, kv_bits = values.pop("tail", 3), values.pop("kv_bits", 4)
        settings = AarConfig(**values)
        cache = TrainingCache(kv_bits) if kv_bits < 16 else None
        student = bench.student(bench.number, trained, tail)
        sharing = shared_inputs(bench.blocks[bench.number], bench.seen[0][:1], call)
        add_quantizers(student, sharing, call, bench.seen[0], settings, tail=tail, kv_bits=kv_bits, batch=BATCH)
        steps = aar_block(
            student,
            call,
            bench.seen[0],
            bench.targets[0],
            settings,
            kv_bits=kv_bits,
            seed=0,
            autocast=contextlib.nullcontext,
        )
        for _ in steps:
            pass
        report("3", name, bench.errors(student, cache), time.perf_counter() - began)


if __name__ == "__main__":
    main()
