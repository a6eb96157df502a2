"""Export, install in an empty environment, load, compare: ``python -m benchmarks.round_trip [CHECKPOINT|RUN]``.

The checkpoint (by default the one included with the project) is exported as a packed folder. A new virtual
environment gets this project by ``pip install FOLDER``, with the requirements that are pinned in it, and nothing else.
There, away from the source tree, ``import lbllm`` and transformers' from_pretrained load the exported folder, while
this environment loads the checkpoint itself. Printed is whether logits and a greedy answer are the same, bit for bit.

pip reads its own settings, e.g. PIP_FIND_LINKS for a folder of wheels. Both processes compute on one thread.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.command_line import command_parser, one_message
from benchmarks.environment import VARIABLES, folder_bytes, make_environment
from benchmarks.report import ROOT, settings_of, write_report
from lbllm.checkpoints.find import find_checkpoint

PROBE = """
import hashlib, json, sys
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
by = f"{Path(lbllm.__file__).parent}, {versions}"
shape = str(tuple(logits.shape))
print(json.dumps({"digest": digest, "logits": shape, "answer_tokens": answer.shape[1] - 16, "by": by}))
"""


def probe(python: str, folder: Path, cwd: Path) -> dict[str, Any]:
    """The digest of what a model gives in an environment, and what computed it. Exits with the reason where it can't be
    loaded."""
    command = [python, "-c", PROBE, str(folder)]
    result = subprocess.run(command, cwd=cwd, env=VARIABLES, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{python} can't load {folder}:\n{result.stderr}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


@one_message()
def main() -> None:
    parser = command_parser(__doc__)
    parser.add_argument("checkpoint", nargs="?", default="shipped", help="a packed folder, a run, or shipped")
    options = parser.parse_args()
    before = find_checkpoint(options.checkpoint).folder.resolve()
    with tempfile.TemporaryDirectory() as scratch:
        folder, environment = Path(scratch) / "exported", Path(scratch) / "environment"
        command = ["-m", "lbllm", "export", str(before), "--to", "packed", "--out", str(folder)]
        subprocess.run([sys.executable, *command], cwd=ROOT, check=True)
        exported = folder_bytes(folder)
        python = make_environment(environment, str(ROOT), cwd=Path(scratch))
        here = probe(sys.executable, before, ROOT)  # python -c imports from the current folder first
        there = probe(python, folder, Path(scratch))
    same = here["digest"] == there["digest"]
    for name, found in (("here: ", here), ("there:", there)):
        print(f"{name} logits {found['logits']} by {found['by']}")
    result, digests = "bit-equal" if same else "DIFFERENT", [found["digest"][:16] for found in (here, there)]
    print(f"{result}: {digests[0]} here, {digests[1]} after export and installation")
    if options.out:
        row = {"label": options.checkpoint, "disk_mb": round(exported / 1e6, 1), "logits": there["logits"]}
        row |= {"answer_tokens": there["answer_tokens"], "result": result}
        write_report(options.out, "round_trip", settings_of(options), [row], threads=1)
    sys.exit(0 if same else 1)


if __name__ == "__main__":
    main()
