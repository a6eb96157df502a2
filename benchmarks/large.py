"""Peak memory of a run whose model is larger than its memory, beside the estimate, under a hard limit.

    python -m benchmarks.large llama-3.2-1b --limit 3
    python -m benchmarks.large llama-2-7b --limit 8 --blocks 3
    python -m benchmarks.large llama-2-7b --limit 8 --blocks 1 --tokens 131072 --stages ptq
    python -m benchmarks.large llama-3.2-1b --blocks 2 --preset paper --stages ptq,wat --end no      a relaxed bitmap
    python -m benchmarks.large gemma-3-270m --limit 2.5
    python -m benchmarks.large qwen3-30b-a3b --limit 6            one block of it, with 128 experts

A model of random weights in the real shapes is written to ``--work`` as sharded bfloat16 safetensors, with a tokenizer
made from the project's own text. Then the run's worker does stages 1 to 3 of a preset with so many tokens, under
``prlimit --data`` where there is a limit (GiB). Its anonymous memory is sampled twenty times a second. With
``--blocks N`` each stage trains its first N blocks; the others take over the state of the last one trained, so the end
of the run, its evaluation and its checkpoint in several files, is that of the whole model; the time of all blocks then
follows from the seconds a block. ``--end no`` leaves the run after its last trained block.
"""

from __future__ import annotations

import gzip
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from benchmarks.command_line import command_parser, count, one_message, progress
from benchmarks.report import settings_of, write_report
from lbllm.config import RunConfig, make_config
from lbllm.errors import ConfigError, LbllmError
from lbllm.events import BlockDone, Evaluated, Event, RunDone, RunFailed, RunStarted, StageDone, StageStarted
from lbllm.files import new_folder
from lbllm.machine import fastest_matmul_rate
from lbllm.measure.estimate import estimate
from lbllm.measure.needs import needs, planned_layers
from lbllm.models.experts import split_experts
from lbllm.models.loading import INDEX
from lbllm.models.teacher import skeleton
from lbllm.pipeline.evaluated import read_evaluated, write_evaluated
from lbllm.places import ASSETS
from lbllm.runs.store import Run, RunStore
from lbllm.sections import PAPER_STAGES, Stage
from lbllm.stages.block_store import BlockStore

_LLAMA: dict[str, Any] = {"rope_theta": 10_000.0, "bos_token_id": 1, "eos_token_id": 2}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-3.2-1b": (
        "llama",
        _LLAMA
        | {"vocab_size": 128_256, "hidden_size": 2_048, "intermediate_size": 8_192, "num_hidden_layers": 16}
        | {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64, "tie_word_embeddings": True}
        | {"max_position_embeddings": 131_072},
    ),
    "llama-2-7b": (
        "llama",
        _LLAMA
        | {"vocab_size": 32_000, "hidden_size": 4_096, "intermediate_size": 11_008, "num_hidden_layers": 32}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4_096},
    ),
    "gemma-3-270m": (
        "gemma3_text",
        {"vocab_size": 262_144, "hidden_size": 640, "intermediate_size": 2_048, "num_hidden_layers": 18}
        | {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "query_pre_attn_scalar": 256}
        | {"max_position_embeddings": 32_768, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
    ),
    "qwen3-30b-a3b": (
        "qwen3_moe",
        {"vocab_size": 151_936, "hidden_size": 2_048, "intermediate_size": 6_144, "num_hidden_layers": 1}
        | {"num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "num_experts": 128}
        | {"num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True}
        | {"max_position_embeddings": 40_960, "tie_word_embeddings": False, "bos_token_id": 1, "eos_token_id": 2},
    ),
    "tiny-moe": (
        "qwen3_moe",
        {"vocab_size": 4_096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "num_experts": 8}
        | {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "max_position_embeddings": 2_048}
        | {"bos_token_id": 1, "eos_token_id": 2},
    ),
    "tiny": (
        "llama",
        _LLAMA
        | {"vocab_size": 4_096, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
        | {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 2_048},
    ),
}
TOKENS = 4_000  # of the tokenizer
SHARD_BYTES = 2_000_000_000


def write_model(folder: Path, shape: str) -> None:
    """Write a model of random weights (standard deviation 0.02, norms 1) and its tokenizer, a shard at a time."""
    kind, settings = SHAPES[shape]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings), dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with new_folder(folder) as draft:
        weight_map: dict[str, str] = {}
        part: dict[str, torch.Tensor] = {}

        def close() -> None:
            name = f"model-{len(set(weight_map.values())) + 1:05d}.safetensors"
            save_file(part, draft / name, {"format": "pt"})
            weight_map.update(dict.fromkeys(part, name))
            part.clear()

        # Experts one by one, as files of such models have them.
        split_experts(model)
        for name, parameter in model.named_parameters():
            norm = parameter.ndim == 1 and not name.endswith("bias")
            # Gemma's norms multiply by 1 + weight.
            value = torch.full(parameter.shape, float("gemma" not in kind)) if norm else torch.empty(parameter.shape)
            part[name] = (value if norm else value.normal_(0, 0.02, generator=generator)).bfloat16()
            if sum(tensor.nbytes for tensor in part.values()) > SHARD_BYTES:
                close()
        close()
        (draft / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
        model.config.save_pretrained(draft)
        _tokenizer().save_pretrained(draft)


def _texts() -> Iterator[str]:
    with gzip.open(ASSETS / "corpus.jsonl.gz", "rt", encoding="utf-8") as rows:
        for row in rows:
            yield json.loads(row)["text"]


def _tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENS,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(itertools.islice(_texts(), 300), trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


class Watched:
    """A worker under a limit of ``limit`` bytes of data; samples its anonymous memory by what the run does."""

    def __init__(self, store: RunStore, run: Run, limit: int | None) -> None:
        self._store, self._run = store, run
        self._after = max((stored.seq for stored in store.events(run.id)), default=0)
        self.peaks: dict[str, int] = {}
        command = [sys.executable, "-m", "lbllm.worker", str(run.folder)]
        if limit is not None:
            command = ["prlimit", f"--data={limit}", *command]
        with (run.folder / "worker.log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def events(self) -> Iterator[Event]:
        """The run's further events as they come, until the worker has ended."""
        doing, after = "start", self._after
        while True:
            ended = self._process.poll() is not None
            for stored in self._store.events(self._run.id, after):
                after = stored.seq
                if isinstance(stored.event, StageStarted):
                    doing = f"stage {PAPER_STAGES.index(stored.event.stage) + 1}"
                elif isinstance(stored.event, StageDone):
                    doing = "evaluation"
                elif isinstance(stored.event, Evaluated) and stored.event.what == self._run.config.stages[-1]:
                    doing = "checkpoint"
                yield stored.event
            if ended:
                return
            self.peaks[doing] = max(self.peaks.get(doing, 0), _anonymous(self._process.pid))
            time.sleep(0.05)


def _anonymous(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((1_024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0)


def train(config: RunConfig, work: Path, limit: int | None, blocks: int | None, end: bool) -> dict[str, Any]:
    """Run the stages under the limit; returns the peaks in bytes and the seconds of each trained block."""
    store = RunStore(work / "runs")
    run = store.create(config)
    seconds: dict[Stage, list[float]] = {stage: [] for stage in config.stages}
    peaks: dict[str, int] = {}
    shape = skeleton(config.model).config.get_text_config()
    done, streams = False, "memory"
    while not done:
        watched = Watched(store, run, limit)
        stopped: Stage | None = None
        for event in watched.events():
            if isinstance(event, RunFailed):
                raise LbllmError(event.message)
            if isinstance(event, BlockDone):
                seconds[event.stage].append(event.seconds)
                progress(f"{event.stage} block {event.block}: {event.seconds:.0f} s, loss {event.loss_after:.4f}")
                if blocks is not None and event.block + 1 == blocks < shape.num_hidden_layers:
                    stopped = event.stage
                    store.request(run.id, "stop")
            if isinstance(event, RunStarted):
                streams = event.streams
            done = done or isinstance(event, RunDone)
        for doing, peak in watched.peaks.items():
            peaks[doing] = max(peaks.get(doing, 0), peak)
        if not done and stopped is None:
            raise LbllmError(f"the worker ended before the run did; see {run.folder / 'worker.log'}")
        if stopped is not None:
            if stopped == config.stages[-1] and not end:
                break
            _fill(run, config, stopped, blocks or 0, shape.num_hidden_layers)
    size = sum(file.stat().st_size for file in (run.folder / "checkpoint").glob("model*.safetensors"))
    files = len(list((run.folder / "checkpoint").glob("model*.safetensors")))
    return {"peaks": peaks, "seconds": seconds, "checkpoint": size, "files": files, "streams": streams}


def _fill(run: Run, config: RunConfig, stage: Stage, done: int, blocks: int) -> None:
    """Give the blocks of a stage that are not trained the state of the last trained one, and skip the evaluation."""
    first = BlockStore(run.folder, None)
    state = first.finished(stage, done - 1)
    with safe_open(first.path(stage, done - 1), "pt") as file:
        mark = file.metadata()["fingerprint"]
    kept = {name: tensor for name, tensor in state.tensors.items() if not name.endswith(".latent")}
    if done < blocks and first.path(stage, done - 1, 0).exists():
        raise ConfigError("--blocks can't take over the state of experts; choose a shape with few blocks")
    own = BlockStore(run.folder, mark, config.stages)
    for number in range(done, blocks):
        own.save(stage, number, replace(state, tensors=kept))
    if stage != config.stages[-1]:  # only the teacher and the last stage are evaluated
        known = read_evaluated(run.folder / "blocks", config)
        write_evaluated(run.folder / "blocks", config, known | {stage: known["teacher"]})


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--tokens", type=count, default=8_192, help="of each stage")
    parser.add_argument("--preset", choices=("standard", "paper"), default="standard")
    parser.add_argument("--stages", default=",".join(PAPER_STAGES))
    parser.add_argument("--limit", type=float, help="GiB of data that the worker may have")
    parser.add_argument("--blocks", type=count, help="blocks of each stage that are trained; default: all")
    parser.add_argument("--end", choices=("yes", "no"), default="yes")
    parser.add_argument("--work", type=Path, default=Path("out/large"))
    options = parser.parse_args()
    if options.limit is not None and shutil.which("prlimit") is None:
        raise ConfigError("--limit needs the program prlimit (package util-linux)")
    model = options.work / options.shape
    if not model.is_dir():
        progress(f"writing {model}")
        write_model(model, options.shape)
    sizes = (f"{stage}.tokens={options.tokens}" for stage in PAPER_STAGES)
    settings = {"model": str(model), "corpus": str(ASSETS / "corpus.jsonl.gz"), "device": "cpu"}
    config = make_config(options.preset, settings | {"stages": options.stages.split(",")}, assignments=tuple(sizes))
    limit = None if options.limit is None else round(options.limit * 2**30)
    checkpoint_bytes, rate = estimate(config).disk_bytes, fastest_matmul_rate("cpu")
    found = train(config, options.work, limit, options.blocks, options.end == "yes")
    peak = max(found["peaks"].values())
    structure = skeleton(config.model)
    layers = planned_layers(structure, config.precision(config.stages[-1]))
    expected = needs(config, structure, layers, checkpoint_bytes, gpu=False, streams=found["streams"])
    expected_peak = sum(expected.memory.values())
    blocks = structure.config.get_text_config().num_hidden_layers
    rows = [
        {"label": f"peak of {doing}", "value": round(size / 2**20), "unit": "MiB"}
        for doing, size in found["peaks"].items()
    ]
    rows += [
        {"label": "peak, measured", "value": round(peak / 2**20), "unit": "MiB"},
        {"label": "peak, estimated", "value": round(expected_peak / 2**20), "unit": "MiB"},
        {"label": "estimated over measured", "value": round(expected_peak / peak, 3), "unit": ""},
        {"label": "matrix products", "value": round(rate / 1e9), "unit": "GFLOP/s"},
    ]
    for stage, times in found["seconds"].items():
        if times:
            mean = sum(times) / len(times)
            rows.append({"label": f"{stage}: a block", "value": round(mean, 1), "unit": "s"})
            rows.append({"label": f"{stage}: all {blocks}", "value": round(blocks * mean / 3600, 2), "unit": "h"})
    if found["files"]:
        size = round(found["checkpoint"] / 1e6)
        rows.append({"label": f"checkpoint, {found['files']} files", "value": size, "unit": "MB"})
    for row in rows:
        print(f"{row['label']:32} {row['value']:>12,} {row['unit']}")
    if options.out:
        write_report(options.out, "large", settings_of(options, "work"), rows, threads=os.cpu_count())


if __name__ == "__main__":
    main()
