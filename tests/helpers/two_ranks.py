"""One of two processes that share a run: ``python -m tests.helpers.two_ranks FOLDER``. ``start`` starts both.

They first exchange tensors, then do a whole run in FOLDER/whole and begin one in FOLDER/killed, in which rank 1 kills
itself. Each writes what it saw to FOLDER/<rank>.pt.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lbllm import ranks
from lbllm.events import BlockDone, Event, StepMetric
from lbllm.machine import make_accelerator
from lbllm.pipeline import run as pipeline
from lbllm.stages.hessians import input_statistics
from lbllm.texts.corpus import Corpus, sequences_hash
from tests.helpers import ROOT
from tests.helpers.tiny_runs import run_config, tiny_teacher, token_ids

SEQUENCES = 192
BATCH = 64  # sequences of 32 tokens in one forward pass
STAGES = ("ptq", "wat", "aar", "e2e")
SETTINGS: dict[str, Any] = {
    "stages": STAGES,
    # So small a model answers the last bit of a sum with other codes of its cache, and those with other losses by 1%.
    "quant": {"kv_bits": 16},
    "ptq": {"tokens": SEQUENCES * 32},
    "wat": {"tokens": 512, "batch_tokens": 128},
    "aar": {"tokens": 512, "batch_tokens": 128},
    "e2e": {"tokens": 512, "epochs": 1, "batch_tokens": 128},
}


def batches() -> tuple[list[Tensor], list[Tensor]]:
    """Inputs (tokens, 12) of a layer in the student and in the teacher, in batches; the last one is smaller."""
    generator = torch.Generator().manual_seed(3)
    sizes = (64, 64, 64, 64, 40)
    seen = [torch.randn(size, 12, generator=generator) for size in sizes]
    seen[0][3] *= 100  # a token of massive activation
    return seen, [x + 0.1 * torch.randn(x.shape, generator=generator) for x in seen]


def events(folder: Path) -> Iterator[Event]:
    """The events of a run of a tiny model in ``folder``; it goes on where the folder has finished blocks."""
    folder.mkdir(exist_ok=True)
    (folder / "precision").write_text("no")
    sequences = token_ids(SEQUENCES)
    corpus = Corpus("given", sequences_hash(sequences), sequences)
    config = run_config(**SETTINGS)
    return pipeline.run(config, folder, request=lambda: None, teacher=tiny_teacher("llama"), corpus=corpus)


def start(folder: Path) -> list[subprocess.Popen[str]]:
    """Start both processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    return [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.two_ranks", str(folder)],
            cwd=ROOT,
            env=os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]


def exchange() -> dict[str, Any]:
    """What the functions of ``lbllm.ranks`` give on this rank."""
    rank = ranks.rank()
    share = ranks.Share(11, unit=2)
    tensors = [torch.full((2, 3), rank + 1.0), torch.full((5,), rank + 1.0, dtype=torch.float64), torch.ones(4, 4).t()]
    ranks.sum_(*tensors)
    rows = torch.full((7, 2), -1)
    rows[ranks.part(7)] = torch.arange(14).view(7, 2)[ranks.part(7)]
    ranks.gather_(rows)
    seen, meant = batches()
    return {
        "sums": tensors,
        "same": ranks.same({"rank": rank}),
        "mean": (ranks.mean(rank + 1.0, 2 * rank + 1), ranks.mean([5.0, float("nan")][rank], 1 - rank)),
        "gathered": rows,
        "share": share.of(torch.arange(11)),
        "mine": share.mine(torch.tensor([9, 2, 0, 10, 3, 6])),
        "statistics": input_statistics(seen[rank::2], meant[rank::2]),
    }


def main(folder: Path) -> None:
    """Do the work of one rank."""
    make_accelerator("cpu", "no")
    found = exchange() | {"losses": [e for e in events(folder / "whole") if isinstance(e, BlockDone)]}
    torch.save(found, folder / f"{ranks.rank()}.pt")
    try:
        for event in events(folder / "killed"):
            if isinstance(event, StepMetric) and event.block == 1 and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGKILL)
    except RuntimeError as error:
        (folder / "lost").write_text(str(ranks.is_loss(error)))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
