"""A tiny packed model behind the server: loaded, and on a socket of its own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from lbllm.chat.pool import Loaded, load_model
from lbllm.sections import QuantConfig
from lbllm.serving.line import Line
from lbllm.serving.server import build
from lbllm.web import names_of
from tests.helpers.ports import free_port
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.helpers.waiting import wait_until


def tiny_loaded(folder: Path) -> Loaded:
    """A packed model with room for long answers, whose cache keeps every bit."""
    quant = QuantConfig(group_size=16, act_bits=16, kv_bits=16)
    return load_model(str(tiny_checkpoint(folder, "llama", quant, max_position_embeddings=8192)[0]))


@contextmanager
def listening(line: Line) -> Iterator[str]:
    """Serve the model as ``tiny``; yields the address."""
    port = free_port()
    app = build(line, "tiny", names_of("127.0.0.1"))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="warning", timeout_graceful_shutdown=1))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started, seconds=20)
    try:
        yield f"http://127.0.0.1:{port}"
    finally:
        server.should_exit = True
        thread.join(20)
