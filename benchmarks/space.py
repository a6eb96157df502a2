"""Whether the Space runs as it stands: ``python -m benchmarks.space [CHECKPOINT]``.

Writes the Space of a checkpoint (default: the one included with the project), makes an empty virtual environment,
installs nothing but the Space's own requirements.txt there, starts app.py with an empty home in a folder that knows
nothing of this project, and talks to it through gradio_client. Prints what it found; ends with an error if anything
fails. Needs a package registry, some 3 GB of disk, and minutes.
"""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gradio_client import Client

from benchmarks.command_line import command_parser, one_message
from benchmarks.environment import folder_bytes, make_environment
from benchmarks.report import figure, settings_of, write_report
from lbllm.checkpoints.find import find_checkpoint
from lbllm.share.space import write_space
from tests.helpers.ports import free_port

PATIENCE = 1800  # seconds
QUESTION = "What is the capital of France?"


def say(line: str) -> None:
    print(line, flush=True)


def environment(folder: Path, home: Path) -> dict[str, str]:
    """The variables of a machine that has nothing of this project's."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {"HOME": str(home), "PYTHONNOUSERSITE": "1", "VIRTUAL_ENV": str(folder)}


def talk(url: str, server: subprocess.Popen[bytes]) -> list[dict[str, Any]]:
    """Wait until the Space answers, then ask, blind, vote, and read the tally; the speeds of both models."""
    client: Client | None = None
    deadline = time.monotonic() + PATIENCE
    while client is None or not client.predict(api_name="/about")["ready"]:
        if server.poll() is not None or time.monotonic() > deadline:
            raise SystemExit(f"the Space does not answer (exit code {server.returncode})")
        time.sleep(1)
        if client is None:
            try:
                client = Client(url, verbose=False, analytics_enabled=False, httpx_kwargs={"timeout": PATIENCE})
            except Exception:
                continue  # it does not listen yet
    secret = secrets.token_urlsafe()
    seen = list(client.submit(QUESTION, True, 0, secret, api_name="/ask"))
    assert seen[-1]["names"] is None
    shown = client.predict("tie", secret, api_name="/vote")
    say(f"asked {QUESTION!r}, {len(seen)} updates")
    rows = []
    for name, answer in zip(shown["names"], shown["answers"], strict=True):
        assert answer["state"] == "done", answer
        say(f"  {name}: {answer['tokens']} tokens, {answer['tokens_per_second']:.1f} a second: {answer['text']!r}")
        rows.append(figure(f"tokens a second, {name}", round(answer["tokens_per_second"], 1)))
    say(f"tally {client.predict(api_name='/tally')}")
    client.close()
    return rows


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help="packed: its folder, a run, or shipped")
    parser.add_argument("--teacher", help="as of `python -m lbllm showcase`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        space, home, place = root / "space", root / "home", root / "environment"
        write_space(find_checkpoint(arguments.checkpoint).folder, space, teacher=arguments.teacher)
        listed = sorted(path.name + "/" * path.is_dir() for path in space.iterdir())
        rows = [figure("size of the Space", round(folder_bytes(space) / 1e6), "MB")]
        say(f"Space: {rows[0]['value']} MB: {' '.join(listed)}")
        home.mkdir()
        began = time.monotonic()
        python, variables = make_environment(place, "-r", "requirements.txt", cwd=space), environment(place, home)
        listing = subprocess.run(
            [python, "-m", "pip", "list"], env=variables, check=True, capture_output=True, text=True
        )
        packages = listing.stdout.splitlines()[2:]
        assert not any(line.lower().startswith("lbllm ") for line in packages)
        took = time.monotonic() - began
        size = folder_bytes(place) / 1e9
        say(f"installed {len(packages)} packages, {size:.1f} GB, in {took:.0f} s")
        rows += [figure("packages installed", len(packages)), figure("size of the environment", round(size, 1), "GB")]
        rows.append(figure("installation", round(took), "s"))
        port = free_port()
        variables["GRADIO_SERVER_PORT"] = str(port)
        began = time.monotonic()
        server = subprocess.Popen([python, "app.py"], cwd=space, env=variables, stdout=sys.stdout, stderr=sys.stderr)
        try:
            rows += talk(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()
            server.wait()
        took = time.monotonic() - began
        say(f"from start to the last answer {took:.0f} s")
        rows.append(figure("from start to the last answer", round(took), "s"))
    if arguments.out:
        write_report(arguments.out, "space", settings_of(arguments), rows)


if __name__ == "__main__":
    main()
