"""Training speed of stage 2 beside the matmul rate of the same machine, measured in the same run.

    python -m benchmarks.throughput
    python -m benchmarks.throughput --model smollm2-135m-instruct --block 5 --steps 20

A token of a block costs 8 FLOPs per weight: teacher forward 2, student forward 2, backward 4. What the matmul rate
allows is that rate over 8 times the block's weights; the matmul rate is measured on the products of this very block
(forward and both backward products of every linear layer at the batch's size), in the precision the run would use.
Printed: tokens a second and block, the share of what is allowed, and where the time of a step goes (self time by
operator, from PyTorch's profiler).
"""

from __future__ import annotations

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.command_line import command_parser, one_message
from benchmarks.report import machine, settings_of, write_report
from benchmarks.timing import best_seconds
from lbllm.checkpoints.find import open_teacher
from lbllm.config import DEFAULT_MODEL, make_config
from lbllm.errors import ConfigError
from lbllm.machine import make_accelerator
from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    linear_layers,
    linear_weight,
    run_batches,
    share_copy,
)
from lbllm.stages.block_state import collect, restore
from lbllm.stages.ptq import ptq_block
from lbllm.stages.wat import wat_block
from lbllm.texts.corpus import load_corpus

KINDS = {
    "matrix products": ("aten::mm", "aten::addmm", "aten::bmm"),
    "attention": ("aten::_scaled_dot_product",),
    "optimizer": ("Optimizer.step", "aten::lerp_", "aten::addcdiv_", "aten::sqrt", "aten::addcmul_", "aten::_foreach"),
    "fake quantization": ("_NearestLevel", "aten::gt", "aten::addcmul", "aten::copy_", "aten::sum"),
}


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--block", type=int, default=0)
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    config = make_config("quick")
    wat = config.wat.model_copy(update={"epochs": 2})
    teacher = open_teacher(options.model)
    accelerator = make_accelerator("auto")
    _, blocks = decoder_blocks(teacher.model)
    if not 0 <= options.block < len(blocks):
        raise ConfigError(f"--block {options.block}: {teacher.name} has blocks 0 to {len(blocks) - 1}")
    block = blocks[options.block]
    count = max(options.steps // 2, 4) * wat.batch_tokens
    text = load_corpus(options.corpus, teacher.tokenizer, seq_len=config.seq_len, tokens=count).sequences
    call = capture_calls(teacher.model, text[:1])[options.block]
    inputs = first_inputs(teacher.model, text, 4)
    with torch.no_grad(), accelerator.autocast():
        targets = torch.cat(list(run_batches(block, inputs, call, 4))).float()

    layers = linear_layers(block)
    weights = sum(linear_weight(layer).numel() for layer in layers.values())
    dtype = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32

    def products() -> float:
        """Seconds that only the block's matrix products take for one batch: 8 FLOPs per weight and token."""
        total = 0.0
        for layer in layers.values():
            weight = linear_weight(layer).detach().to(dtype).contiguous()
            x = torch.randn(wat.batch_tokens, weight.shape[1]).to(dtype)
            grad = torch.randn(wat.batch_tokens, weight.shape[0]).to(dtype)
            total += 2 * best_seconds(lambda x=x, weight=weight: x @ weight.t(), 0.2)  # type: ignore[misc]
            total += best_seconds(lambda grad=grad, weight=weight: grad @ weight, 0.2)  # type: ignore[misc]
            total += best_seconds(lambda grad=grad, x=x: grad.t() @ x, 0.2)  # type: ignore[misc]
        return total

    before = products()
    student = share_copy(block)
    formats = {name: config.quant.layer(name) for name in layers}
    wanted = {name: fmt for name, fmt in formats.items() if fmt is not None}
    tensors: dict[str, torch.Tensor] = {}
    latents: dict[str, torch.Tensor] = {}
    meant = all_inputs(block, inputs[:4], call, 4)
    for name, result, layer in ptq_block(block, student, call, inputs[:4], meant, wanted, config.ptq, 4):
        tensors |= collect({name: layer})
        latents[name] = result.latent.float()

    def steps() -> float:
        """Median seconds of a step of stage 2, the teacher's forward pass of its tokens included."""
        training = restore(block, wanted, tensors, config.quant.tail_steps)
        run = wat_block(training, call, inputs, targets, latents, wat, seed=0, autocast=accelerator.autocast)
        times = sorted(wat.batch_tokens / step.tokens_per_second for step in run)
        rows = wat.batch_tokens // config.seq_len

        def forward() -> None:
            with torch.no_grad(), accelerator.autocast():
                list(run_batches(block, inputs[:rows], call, rows))

        return times[len(times) // 2] + best_seconds(forward, 0.5)

    step = steps()
    allowed = (before + products()) / 2
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        steps()
    spent = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), "everything else")
        spent[kind] += event.self_cpu_time_total
    total = sum(spent.values())

    flops = 8 * weights * wat.batch_tokens
    row = {"tokens_per_second": round(wat.batch_tokens / step), "gflops_per_second": round(flops / allowed / 1e9)}
    row |= {"allowed_tokens_per_second": round(wat.batch_tokens / allowed)}
    print(f"machine: {machine()}, {torch.get_num_threads()} threads, {dtype}")
    print(f"block {options.block}: {weights:,} weights; batches of {wat.batch_tokens} tokens, length {config.seq_len}")
    rate = f"{row['gflops_per_second']} GFLOP/s"
    print(f"matrix products alone: {rate}, which allows {row['allowed_tokens_per_second']:,} tokens/s")
    print(f"stage 2: {row['tokens_per_second']:,} tokens/s a block, {allowed / step:.0%} of what is allowed")
    print("a step's time: " + ", ".join(f"{kind} {part / total:.0%}" for kind, part in spent.items()))
    if options.out:
        shares = {f"time_{kind.replace(' ', '_')}": part / total for kind, part in spent.items()}
        facts = {"dtype": str(dtype), "batch_tokens": wat.batch_tokens, "seq_len": config.seq_len}
        write_report(
            options.out, "throughput", settings_of(options) | facts, [row | {"share": allowed / step} | shares]
        )


if __name__ == "__main__":
    main()
