"""A real workbench server and a real browser: ``server`` (one for all files, with a home of its own) and ``page``."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, BrowserContext, Page, expect, sync_playwright

from lbllm.runs.store import ACTIVE, RunStore
from tests.helpers import ROOT, waiting
from tests.helpers.homes import own_home
from tests.helpers.ports import free_port

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]


wait_until = partial(waiting.wait_until, seconds=120.0)


@dataclass
class Server:
    """The workbench as ``python -m lbllm ui`` starts it, over a home folder of its own."""

    home: Path
    port: int = field(default_factory=free_port)
    process: subprocess.Popen[bytes] | None = None

    @property
    def store(self) -> RunStore:
        return RunStore(self.home / "runs")

    def url(self, path: str = "") -> str:
        return f"http://localhost:{self.port}/{path}"

    def start(self, seconds: float = 120.0) -> None:
        """Start it; returns when it answers, which must be within ``seconds``."""
        command = [sys.executable, "-m", "lbllm", "ui", "--port", str(self.port), "--no-browser"]
        environment = os.environ | {"LBLLM_HOME": str(self.home), "PYTHONPATH": str(ROOT)}
        self.home.mkdir(parents=True, exist_ok=True)
        with (self.home / "server.log").open("ab") as log:
            self.process = subprocess.Popen(command, cwd=self.home, env=environment, stdout=log, stderr=log)
        wait_until(self._answers, seconds=seconds)

    def _answers(self) -> bool:
        assert self.process is not None
        assert self.process.poll() is None, (self.home / "server.log").read_text()
        try:
            with urllib.request.urlopen(self.url("_stcore/health"), timeout=2) as answer:
                return bool(answer.status == 200)
        except (urllib.error.URLError, OSError):
            return False

    def stop(self) -> None:
        """End it at once, as a crash would."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        self.process = None


@pytest.fixture(scope="package")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A running workbench; each test leaves its runs ended."""
    server = Server(own_home(tmp_path_factory.mktemp("server") / "home", "kernels", "models"))
    server.start()
    yield server
    for run in server.store.all():
        if run.state in ACTIVE:
            server.store.request(run.id, "cancel")
    server.stop()


@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("needs Chromium: apt-get install chromium")
    with sync_playwright() as playwright:
        # The first page of a server waits for torch to be imported.
        expect.set_options(timeout=60_000)
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def context(browser: Browser) -> Iterator[BrowserContext]:
    """A fresh profile. Fails the test where a page threw an error or asked any other machine for something."""
    context = browser.new_context(viewport={"width": 1280, "height": 720})
    context.set_default_timeout(30_000)
    faults: list[str] = []
    context.on("weberror", lambda error: faults.append(str(error.error)))

    def asked(url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme in ("http", "https", "ws", "wss") and parts.hostname not in ("localhost", "127.0.0.1"):
            faults.append(f"asked {url}")

    context.on("request", lambda request: asked(request.url))
    yield context
    context.close()
    assert not faults, faults


@pytest.fixture
def page(context: BrowserContext) -> Page:
    """A blank tab of 1280x720; go to ``server.url("runs")`` and the like."""
    return context.new_page()
