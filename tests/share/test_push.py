"""Pushing to the hub: a local server stands in for it. The token goes there and nowhere else."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants

from lbllm.commands.main import main
from lbllm.errors import ConfigError, HubError
from lbllm.share.push import check_repository, push

TOKEN = "hf_notforanybodyelse"


class Hub:
    """What the hub's client asks for when it uploads small files. ``status``: what the making of a repository gets."""

    def __init__(self) -> None:
        self.status = 200
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}
        self.tokens: set[str | None] = set()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_: object) -> None:
                pass

            def do_GET(self) -> None:
                known = 200 if hub.status == 200 else 404
                self.answer(known, {"siblings": [], "sha": "0" * 40, "id": "me/model"})

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("content-length") or 0))
                hub.tokens.add(self.headers.get("authorization"))
                if self.path.endswith("/repos/create"):
                    hub.created.append(json.loads(body))
                    self.answer(hub.status, {"url": f"{hub.endpoint}/me/model", "name": "me/model", "id": "1"})
                elif "/preupload/" in self.path:
                    files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
                    self.answer(200, {"files": [file | {"shouldIgnore": False} for file in files]})
                elif "/commit/" in self.path:
                    for line in map(json.loads, body.decode().splitlines()):
                        if line["key"] == "file":
                            hub.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
                    done = {"commitUrl": f"{hub.endpoint}/me/model/commit/1", "commitOid": "1"}
                    self.answer(200, done | {"hookOutput": "", "success": True})
                else:
                    self.answer(200, {"errors": [], "warnings": []})

            def answer(self, status: int, document: dict[str, Any]) -> None:
                body = json.dumps(document).encode()
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()
    thread.join()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# A model\n")
    (folder / "model.safetensors").write_bytes(bytes(range(256)))
    return folder


def test_every_file_arrives_in_a_private_repository(hub: Hub, folder: Path) -> None:
    assert push(folder, "me/model", TOKEN) == f"{hub.endpoint}/me/model"
    assert hub.files == {path.name: path.read_bytes() for path in folder.iterdir()}
    (created,) = hub.created
    assert (created["name"], created["organization"], created["visibility"]) == ("model", "me", "private")
    assert hub.tokens == {f"Bearer {TOKEN}"}
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "model.safetensors"]


def test_a_space_is_a_space_on_the_hub_too(hub: Hub, folder: Path) -> None:
    push(folder, "me/model", TOKEN, space=True)
    (created,) = hub.created
    assert (created["type"], created["sdk"], created["visibility"]) == ("space", "gradio", "private")
    assert set(hub.files) == {"README.md", "model.safetensors"}


@pytest.mark.parametrize(("status", "said"), [(401, "refuses the token"), (403, "refuses the token"), (400, "refuses")])
def test_a_refusal_says_what_to_do(hub: Hub, folder: Path, status: int, said: str) -> None:
    hub.status = status
    with pytest.raises(HubError, match=f"{said}.*hf upload --repo-type model me/model") as caught:
        push(folder, "me/model", TOKEN)
    assert TOKEN not in str(caught.value)
    assert hub.files == {}


def test_a_hub_that_does_not_answer(folder: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"127\.0\.0\.1:9 can't be reached.*hf upload"):
        push(folder, "me/model", TOKEN)


@pytest.mark.parametrize("name", ["model", "a/b/c", "../model", "me/", "https://huggingface.co/me/model"])
def test_a_name_that_is_none(name: str) -> None:
    with pytest.raises(ConfigError, match="OWNER/NAME"):
        check_repository(name)


def test_the_command_wants_a_token_before_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    assert main(["export", "no-such-run", "--to", "dense", "--out", str(tmp_path / "out"), "--push", "me/model"]) == 1
    assert "HF_TOKEN" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
