"""Export, install in an empty environment, load, compare: ``python -m benchmarks.round_trip [CHECKPOINT|RUN]``.

The checkpoint (by default the one that comes with the project) is exported as a packed folder. A new virtual
environment gets this project by ``pip install FOLDER``, with the requirements that are pinned in it, and nothing else.
There, away from the source tree, ``import lbllm`` and transformers' from_pretrained load the exported folder, while
this environment loads the checkpoint itself. Printed is whether logits and a greedy answer are the same, bit for bit.

pip reads its own settings, e.g. PIP_FIND_LINKS for a folder of wheels. Both processes compute on one thread.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from lbllm.checkpoints.find import find_checkpoint
from lbllm.errors import LbllmError

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import hashlib, sys
from pathlib import Path
import torch, transformers
import lbllm
torch.set_num_threads(1)
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()
ids = torch.randint(model.config.vocab_size, (1, 256), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    logits = model(ids).logits
mask = torch.ones(1, 16, dtype=torch.long)
answer = model.generate(ids[:, :16], attention_mask=mask, do_sample=False, max_new_tokens=16)
digest = hashlib.sha256(logits.numpy().tobytes() + answer.numpy().tobytes()).hexdigest()
versions = f"torch {torch.__version__}, transformers {transformers.__version__}"
print(f"{digest} logits {tuple(logits.shape)} by {Path(lbllm.__file__).parent}, {versions}")
"""


# This user's variables, which registry pip asks maybe among them, and nothing that Python would find besides.
VARIABLES = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def probe(python: str, folder: Path, cwd: Path) -> list[str]:
    """The digest of what a model gives in an environment, and what computed it."""
    command = [python, "-c", PROBE, str(folder)]
    result = subprocess.run(command, cwd=cwd, env=VARIABLES, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{python} can't load {folder}:\n{result.stderr}")
    return result.stdout.splitlines()[-1].split(" ", 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help="a packed folder, a run, or shipped")
    checkpoint = parser.parse_args().checkpoint
    try:
        before = find_checkpoint(checkpoint).folder.resolve()
    except LbllmError as error:
        raise SystemExit(str(error)) from None
    with tempfile.TemporaryDirectory() as scratch:
        folder, environment = Path(scratch) / "exported", Path(scratch) / "environment"
        command = ["-m", "lbllm", "export", str(before), "--to", "packed", "--out", str(folder)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        venv.create(environment, with_pip=True)
        python = str(environment / "bin" / "python")
        install = [python, "-m", "pip", "install", "--quiet", str(ROOT)]
        subprocess.run(install, cwd=scratch, env=VARIABLES, check=True)
        here, about_here = probe(sys.executable, before, ROOT)  # python -c imports from the current folder first
        there, about_there = probe(python, folder, Path(scratch))
    same = here == there
    print(f"here:  {about_here}\nthere: {about_there}")
    print(f"{'bit-equal' if same else 'DIFFERENT'}: {here[:16]} here, {there[:16]} after export and installation")
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
