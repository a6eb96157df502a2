"""Whether the Space runs as it stands: ``python -m benchmarks.space [CHECKPOINT]``.

Writes the Space of a checkpoint (default: the one that comes with the project), makes an empty virtual environment,
installs nothing but the Space's own requirements.txt there, starts app.py with an empty home in a folder that knows
nothing of this project, and talks to it through gradio_client. Prints what it found; ends with an error where anything
fails. Needs a package registry, some 3 GB of disk, and minutes.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
import venv
from pathlib import Path

from gradio_client import Client

from lbllm.checkpoints.find import find_checkpoint
from lbllm.errors import LbllmError
from lbllm.share.space import write_space
from tests.helpers.ports import free_port

PATIENCE = 1800  # seconds
QUESTION = "What is the capital of France?"


def say(line: str) -> None:
    print(line, flush=True)


def folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def environment(folder: Path, home: Path) -> dict[str, str]:
    """The variables of a machine that has nothing of this project's."""
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    return kept | {"HOME": str(home), "PYTHONNOUSERSITE": "1", "VIRTUAL_ENV": str(folder)}


def talk(url: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the Space answers, then ask, blind, vote, and read the tally."""
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
    seen = list(client.submit(QUESTION, True, 0, api_name="/ask"))
    assert seen[-1]["names"] is None
    shown = client.predict("tie", api_name="/vote")
    say(f"asked {QUESTION!r}, {len(seen)} updates")
    for name, answer in zip(shown["names"], shown["answers"], strict=True):
        assert answer["state"] == "done", answer
        say(f"  {name}: {answer['tokens']} tokens, {answer['tokens_per_second']:.1f} a second: {answer['text']!r}")
    say(f"tally {client.predict(api_name='/tally')}")
    client.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help="a packed folder, a run, or shipped")
    parser.add_argument("--teacher", help="as of `python -m lbllm showcase`")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(temporary)
        space, home, place = root / "space", root / "home", root / "environment"
        try:
            write_space(find_checkpoint(arguments.checkpoint).folder, space, teacher=arguments.teacher)
        except LbllmError as error:
            raise SystemExit(str(error)) from None
        listed = sorted(path.name + "/" * path.is_dir() for path in space.iterdir())
        say(f"Space: {folder_bytes(space) / 1e6:.0f} MB: {' '.join(listed)}")
        home.mkdir()
        venv.create(place, with_pip=True, clear=True)
        python, variables = str(place / "bin" / "python"), environment(place, home)
        began = time.monotonic()
        install = [python, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"]
        # With this user's variables: which registry pip asks may be among them. Not with what else Python would find.
        own = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        subprocess.run(install, cwd=space, env=own | {"PYTHONNOUSERSITE": "1"}, check=True)
        listing = subprocess.run(
            [python, "-m", "pip", "list"], env=variables, check=True, capture_output=True, text=True
        )
        packages = listing.stdout.splitlines()[2:]
        assert not any(line.lower().startswith("lbllm ") for line in packages)
        took = time.monotonic() - began
        say(f"installed {len(packages)} packages, {folder_bytes(place) / 1e9:.1f} GB, in {took:.0f} s")
        port = free_port()
        variables["GRADIO_SERVER_PORT"] = str(port)
        began = time.monotonic()
        server = subprocess.Popen([python, "app.py"], cwd=space, env=variables, stdout=sys.stdout, stderr=sys.stderr)
        try:
            talk(f"http://127.0.0.1:{port}", server)
        finally:
            server.terminate()
            server.wait()
        say(f"from start to the last answer {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
