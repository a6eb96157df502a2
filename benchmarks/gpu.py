"""What a real GPU shows, in parts of at most five minutes each:

    python -m benchmarks.gpu tests
    python -m benchmarks.gpu training --out training.json
    python -m benchmarks.gpu decode --out decode.json
    python -m benchmarks.gpu embedded --out embedded.json     again and again, until the run is done

- ``tests``: all tests marked gpu, which need one.
- ``training``: tokens a second of a block in stages 1 to 3, and the share of the bfloat16 peak that stages 2 and 3
  reach, where a token costs 6 FLOPs a weight. The peak is the measured rate of a large matrix product.
- ``decode``: a packed model beside its teacher in bfloat16 in the same process: tokens a second of greedy decoding and
  of reading a prompt, and both ratios.
- ``embedded``: a run of the preset standard, without stage 4, on a million tokens of its text: seconds, perplexities,
  and the hours that 16.8 million tokens would take. The run stops after ``--seconds`` and goes on at the next call.

Without a GPU it says so and ends with code 2; ``--device cpu`` tries a part on the CPU.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import ROOT, machine, settings_of, write_report
from benchmarks.timing import median_seconds
from lbllm.checkpoints.find import find_checkpoint, open_teacher
from lbllm.checkpoints.hf import load
from lbllm.config import DEFAULT_MODEL, RunConfig, make_config
from lbllm.events import Evaluated, RunDone, StageDone
from lbllm.machine import device_named, fastest_matmul_rate, make_accelerator
from lbllm.models.blocks import (
    all_inputs,
    capture_calls,
    decoder_blocks,
    first_inputs,
    linear_layers,
    linear_weight,
    run_batches,
    share_copy,
    shared_inputs,
)
from lbllm.pipeline.run import run
from lbllm.quant.kv_cache import KVFormat
from lbllm.quant.kv_groups import training_cache
from lbllm.sections import PAPER_STAGES
from lbllm.stages.aar import aar_block, add_quantizers
from lbllm.stages.block_state import collect, restore
from lbllm.stages.ptq import ptq_block
from lbllm.stages.wat import wat_block
from lbllm.texts.corpus import load_corpus

PAPER_TOKENS = 16_777_216
BATCH = 4
Row = dict[str, Any]


def run_tests() -> int:
    """Run the tests marked gpu; returns pytest's exit code."""
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests"], cwd=ROOT).returncode


def training(name: str, corpus: str, device: str, steps: int) -> list[Row]:
    """Tokens a second of block 0 in each stage."""
    config, teacher = make_config("standard"), open_teacher(name)
    accelerator = make_accelerator(device)
    model = teacher.model.to(accelerator.device)
    block = decoder_blocks(model)[1][0]
    tokens = max(steps * config.wat.batch_tokens, BATCH * config.seq_len)
    text = load_corpus(corpus, teacher.tokenizer, seq_len=config.seq_len, tokens=tokens).sequences
    call = capture_calls(model, text[:1].to(accelerator.device))[0]
    inputs = first_inputs(model, text, BATCH).cpu()
    with torch.no_grad(), accelerator.autocast():
        targets = torch.cat([part.float().cpu() for part in run_batches(block, inputs, call, BATCH)])
    layers = linear_layers(block)
    weights = sum(linear_weight(layer).numel() for layer in layers.values())
    prefix = f"{decoder_blocks(model)[0]}.0."
    formats = {one: fmt for one in layers if (fmt := config.quant.layer(prefix + one)) is not None}
    peak = fastest_matmul_rate(device)

    tensors: dict[str, Tensor] = {}
    latents: dict[str, Tensor] = {}
    began, student = time.perf_counter(), share_copy(block)
    meant = all_inputs(block, inputs[:BATCH], call, BATCH)
    for one, result, layer in ptq_block(block, student, call, inputs[:BATCH], meant, formats, config.ptq, BATCH):
        tensors |= collect({one: layer})
        latents[one] = result.latent
    seconds = time.perf_counter() - began
    rows: list[Row] = [{"stage": "ptq", "seconds": seconds, "weights_per_second": round(weights / seconds)}]
    once: dict[str, Any] = {"epochs": 1}
    for stage in ("wat", "aar"):
        trained = restore(block, formats, tensors, config.quant.tail_steps)
        options: dict[str, Any] = {"seed": 0, "autocast": accelerator.autocast}
        if stage == "wat":
            taken = wat_block(trained, call, inputs, targets, latents, config.wat.model_copy(update=once), **options)
        else:
            aar, cache = config.aar.model_copy(update=once), training_cache(KVFormat.of(config.quant))
            sharing = shared_inputs(block, inputs[:1], call)
            tail = config.quant.tail_steps
            add_quantizers(trained, sharing, call, inputs, aar, tail=tail, cache=cache, batch=BATCH)
            taken = aar_block(trained, call, inputs, targets, aar, cache=cache, **options)
        rates = sorted(step.tokens_per_second for step in taken)
        rate = rates[len(rates) // 2]
        row = {"stage": stage, "tokens_per_second": round(rate), "peak_tflops": peak / 1e12}
        rows.append(row | {"share_of_peak": 6 * weights * rate / peak})
    return rows


def decode(name: str, checkpoint: str, device: str, prompt: int, tokens: int, seconds: float) -> list[Row]:
    """Tokens a second of the packed model and of its teacher in bfloat16, in turns."""
    packed = load(find_checkpoint(checkpoint).folder, device=device, dtype=torch.bfloat16)[0]
    dense = open_teacher(name, dtype=torch.bfloat16, device=device).model
    ids = (torch.arange(prompt, device=device)[None] * 7 + 11) % packed.config.vocab_size

    def answer(model: Any, count: int) -> Callable[[], object]:
        options = {"do_sample": False, "max_new_tokens": count, "min_new_tokens": count}

        def work() -> None:
            model.generate(ids, attention_mask=torch.ones_like(ids), **options)
            if ids.is_cuda:
                torch.cuda.synchronize()

        return work

    both = (packed, dense)
    first = median_seconds([answer(model, 1) for model in both], seconds / 2)
    whole = median_seconds([answer(model, tokens + 1) for model in both], seconds / 2)
    rows: list[Row] = []
    for label, read, all_of_it in zip(("packed", "bfloat16"), first, whole, strict=True):
        speed = {"prefill_tokens_per_second": prompt / read, "decode_tokens_per_second": tokens / (all_of_it - read)}
        rows.append({"label": label} | speed)
    ratios = {key: rows[0][key] / rows[1][key] for key in rows[0] if key != "label"}
    return [*rows, {"label": "packed / bfloat16"} | ratios]


def embedded_config(model: str, corpus: str, device: str, tokens: int) -> RunConfig:
    """The preset standard, without stage 4, on so many tokens."""
    changes = {"model": model, "corpus": corpus, "device": device, "stages": list(PAPER_STAGES)}
    return make_config("standard", {**changes, "wat": {"tokens": tokens}, "aar": {"tokens": tokens}})


def embedded(config: RunConfig, folder: Path, seconds: float) -> list[Row]:
    """Go on with the run for so long; the rows of what is measured so far, with the seconds of all calls."""
    folder.mkdir(parents=True, exist_ok=True)
    clock = folder / "seconds"
    spent = float(clock.read_text()) if clock.is_file() else 0.0
    began, done = time.perf_counter(), False
    rows: list[Row] = []
    for event in run(config, folder, request=lambda: "stop" if time.perf_counter() - began > seconds else None):
        if isinstance(event, Evaluated):
            rows.append({"label": f"perplexity, {event.what}", "value": event.perplexity})
        elif isinstance(event, StageDone):
            progress(f"{event.stage} is done")
        elif isinstance(event, RunDone):
            done = True
    spent += time.perf_counter() - began
    clock.write_text(str(spent))
    rows += [{"label": "seconds", "value": spent}, {"label": "done", "value": int(done)}]
    if done:
        tokens = config.wat.tokens
        rows.append({"label": f"hours for {PAPER_TOKENS:,} tokens", "value": spent / tokens * PAPER_TOKENS / 3600})
    else:
        progress(f"The run stopped after {spent:.0f} s in all. Give the same command again to go on.")
    return rows


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("part", choices=["tests", "training", "decode", "embedded"])
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try a part without a GPU")
    parser.add_argument("--model", default=DEFAULT_MODEL)
    parser.add_argument("--corpus", default="embedded")
    parser.add_argument("--checkpoint", default="shipped", help="for decode: the packed model")
    parser.add_argument("--steps", type=count, default=20, help="for training: steps of a stage")
    parser.add_argument("--prompt", type=count, default=512, help="for decode: tokens")
    parser.add_argument("--tokens", type=count, help="for decode (128) and embedded (1,048,576)")
    parser.add_argument("--seconds", type=float, default=240.0, help="for decode and embedded: time to measure")
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu-embedded"), help="for embedded: the run")
    options = parser.parse_args()
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("This benchmark needs a GPU that torch can use, and this machine has none.", file=sys.stderr)
        raise SystemExit(2)
    device = device_named(options.device)
    if options.part == "tests":
        raise SystemExit(run_tests())
    if options.part == "training":
        rows = training(options.model, options.corpus, device, options.steps)
    elif options.part == "decode":
        tokens = options.tokens or 128
        rows = decode(options.model, options.checkpoint, device, options.prompt, tokens, options.seconds)
    else:
        config = embedded_config(options.model, options.corpus, device, options.tokens or 2**20)
        rows = embedded(config, options.folder, options.seconds)
    print(machine())
    for row in rows:
        print(
            ", ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in row.items()
            )
        )
    if options.out:
        write_report(options.out, "gpu", settings_of(options), rows)


if __name__ == "__main__":
    main()
