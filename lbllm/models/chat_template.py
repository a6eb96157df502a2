"""Render a model's chat template. The template comes with the model, so it runs in a process of its own, with bounds
on time and memory: an endless loop or an error in it becomes a message."""

from __future__ import annotations

import atexit
import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from lbllm.errors import ModelError

_PROGRAM = Path(__file__).with_name("template_process.py")
_OTHERWISE = "turn the chat template off, or correct it in the model's folder (chat_template.jinja)"


class _Renderer:
    """The process, started at its first use and again after it ended; threads share it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, request: dict[str, Any]) -> dict[str, str]:
        """Return the answer to a request: its "text", or the "error"."""
        line = json.dumps(request, default=str).encode() + b"\n"
        with self._lock:
            for _ in range(2):
                fresh = self._process is None
                process = self._process or self._start()
                assert process.stdin is not None
                assert process.stdout is not None
                try:
                    process.stdin.write(line)
                    process.stdin.flush()
                    answer = process.stdout.readline()
                except OSError:
                    answer = b""
                if answer.endswith(b"\n"):
                    found: dict[str, str] = json.loads(answer)
                    return found
                code = self._end()
                if fresh or code != 0:
                    break
            return {"error": "it takes too much time or memory"}

    def _start(self) -> subprocess.Popen[bytes]:
        # A session of its own: Ctrl-C in the terminal is not for it.
        self._process = subprocess.Popen(
            [sys.executable, "-I", str(_PROGRAM)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        return self._process

    def _end(self) -> int:
        process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for stream in (process.stdin, process.stdout):
            if stream is not None:
                with suppress(OSError):
                    stream.close()
        return code

    def close(self) -> None:
        """End the process."""
        with self._lock:
            self._end()


_renderer = _Renderer()
atexit.register(_renderer.close)


def render(
    tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]], *, add_generation_prompt: bool = False
) -> str:
    """Return messages (role, content) in the tokenizer's chat template, as ``apply_chat_template`` does.

    Raises ModelError if the template refuses them, fails, or takes too much time or memory.
    """
    values = {
        **tokenizer.special_tokens_map,
        "messages": messages,
        "tools": None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
    }
    answer = _renderer.ask({"template": default_template(tokenizer), "values": values})
    if "error" in answer:
        raise ModelError(f"the model's chat template refuses these messages: {answer['error']}; {_OTHERWISE}")
    return answer["text"]


def default_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template for messages without tools. Raises ModelError if the model does not say which it is."""
    stated: object = tokenizer.chat_template
    if isinstance(stated, dict):
        if "default" not in stated:
            raise ModelError(
                f"the model has chat templates for {', '.join(sorted(map(str, stated)))}, and none is called default; "
                "turn the chat template off, or give one of them that name in the model's folder"
            )
        stated = stated["default"]
    if not isinstance(stated, str):
        raise ModelError(f"the model's chat template is no text but a {type(stated).__name__}; {_OTHERWISE}")
    return stated
