"""LBLLM: binarize large language models to W(1+1)A4. Importing this package registers its checkpoints with
transformers.

    model, tokenizer = lbllm.load("runs/quick")             a packed checkpoint; transformers' from_pretrained works
    as well
    lbllm.quantize(model, tokenizer, config, out="out")     the three stages, in this process
"""

import importlib.util
import os
import sys
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

if importlib.util.find_spec("fcntl") is None:
    _MESSAGE = (
        "LBLLM Workbench does not run on this system: it needs the file locks of Linux and macOS (Python's module "
        "fcntl). On Windows use WSL 2, or the container (docker compose up)."
    )
    # A command ends with the message alone; a program that imports the package gets an exception that it can catch.
    if sys.argv[:1] == ["-m"] or PurePath(*sys.argv[:1]).stem == "lbllm":
        sys.exit(_MESSAGE)
    raise ImportError(_MESSAGE)

# Idle threads of PyTorch must not spin for long: with a second busy process on two cores they make decoding many times
# slower. Not at all is too little: waking a sleeping thread for each small operation costs a third of a training step.
# Both have to be set before torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("GOMP_SPINCOUNT", "30000")

if TYPE_CHECKING or not (sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith("/lbllm")):
    # While Python looks for the module of `python -m lbllm...` argv[0] is "-m", in the installed command the command's
    # path: our own commands import what they need, when they need it, and start at once. Everybody else wants the
    # registration, which brings torch with it.
    from lbllm import config as config
    from lbllm.checkpoints.hf import load as load


def __getattr__(name: str) -> Any:
    if name == "quantize":
        # A module of the same name would take its place once it is imported.
        from lbllm.pipeline.in_process import quantize

        return quantize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
