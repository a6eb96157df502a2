"""Models to chat with: loaded in the background, once per process, and released when nobody uses them any more.

    pool = ModelPool()
    mine = pool.get("smollm2-135m-instruct")     returns at once
    mine.wait(); mine.loaded.model ...

The pool itself keeps no model alive: a ``Slot`` lives as long as a reader (a session of the workbench, an answer being
written) refers to it, and everybody who asks for the same name in that time gets the same slot. Dropping the last
reference releases the model; the next load frees memory that reference cycles still hold.
"""

from __future__ import annotations

import gc
import threading
import time
import weakref
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lbllm import kernels
from lbllm.checkpoints.find import FoundCheckpoint, find_model
from lbllm.checkpoints.hf import LbllmConfig
from lbllm.errors import LbllmError, ResourceError
from lbllm.labels import FORMAT_NAMES
from lbllm.machine import device_named, free_memory
from lbllm.models.teacher import load_teacher, skeleton
from lbllm.quant.gpu_trial import on_gpu
from lbllm.quant.packed_embedding import weight_count
from lbllm.quant.packed_layer import PackedLinear, named_groups

State = Literal["waiting", "loading", "ready", "failed"]


@dataclass(frozen=True)
class Loaded:
    """A model that is ready to answer, and facts about it.

    ``weight_bytes``: weights in memory as they are deployed, packed layers in packed form. ``expanded_bytes``: an
    expanded copy of packed weights, kept if there are no kernels for them, else 0. ``bpw``: bits per weight of the
    binarized layers, or of the dense weights in memory.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    packed: bool
    precision: str
    weights: int
    weight_bytes: int
    expanded_bytes: int
    bpw: float

    @property
    def is_chat(self) -> bool:
        """Whether the model has a chat template; without one it continues a text."""
        return self.tokenizer.chat_template is not None


class Slot:
    """The place of one model in the pool; only the loading thread writes its fields."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.state: State = "waiting"
        self.error = ""
        self._asked = time.monotonic()
        self._seconds = 0.0
        self._loaded: Loaded | None = None
        self._over = threading.Event()

    @property
    def loaded(self) -> Loaded:
        """The model. Raises LbllmError with the reason if it is not loaded yet or loading failed."""
        if self._loaded is None:
            raise LbllmError(self.error or f"{self.name} is still being loaded")
        return self._loaded

    @property
    def over(self) -> bool:
        """Whether loading has ended, also with an error."""
        return self._over.is_set()

    @property
    def elapsed(self) -> float:
        """Seconds since the model was requested; after loading, the seconds that loading took."""
        return self._seconds if self.over else time.monotonic() - self._asked

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until loading has ended; return whether it has."""
        return self._over.wait(timeout)

    def load(self, turn: threading.Lock) -> None:
        """Load the model when it is this slot's turn; an error is kept for the readers."""
        with turn:
            self.state = "loading"
            gc.collect()
            try:
                self._loaded = load_model(self.name)
                self.state = "ready"
            except LbllmError as error:
                self.error, self.state = str(error), "failed"
            except Exception as error:
                # Every error of a foreign model must become a message: no caller of this thread could catch it.
                self.error = f"{self.name} can't be loaded ({type(error).__name__}: {error}); choose another model"
                self.state = "failed"
            finally:
                self._seconds = time.monotonic() - self._asked
                self._over.set()


class ModelPool:
    """The models of this process by name; threads may share it."""

    def __init__(self) -> None:
        self._slots: weakref.WeakValueDictionary[str, Slot] = weakref.WeakValueDictionary()
        self._mutex = threading.Lock()
        # One load at a time: two at once take as long, and need the memory of both loads' temporaries.
        self._turn = threading.Lock()
        # At first use the kernels are compiled for half a minute; the first model is loaded in the same time.
        threading.Thread(target=kernels.ready, name="lbllm-kernels", daemon=True).start()

    def get(self, name: str) -> Slot:
        """The slot of a model; starts loading it if nobody holds it yet. Returns at once.

        ``name``: any name that ``find_model`` takes. A failed load is tried again.
        """
        with self._mutex:
            slot = self._slots.get(name)
            if slot is None or slot.state == "failed":
                slot = self._slots[name] = Slot(name)
                threading.Thread(target=slot.load, args=(self._turn,), name="lbllm-pool", daemon=True).start()
        return slot

    def names(self) -> list[str]:
        """Names of the models that somebody holds."""
        return sorted(slot.name for slot in self._slots.values())


def load_model(name: str) -> Loaded:
    """Load a model by any name that ``find_model`` takes. Raises LbllmError; ResourceError if memory is short."""
    device = device_named("auto")
    found = find_model(name)
    if not isinstance(found, FoundCheckpoint):
        _check_memory(name, 4 * skeleton(name).num_parameters(), device)
        teacher = load_teacher(name, device=device)
        stored = _bytes(teacher.model)
        weights = teacher.model.num_parameters()
        return Loaded(
            teacher.model, teacher.tokenizer, False, teacher.precision, weights, stored, 0, 8 * stored / weights
        )
    expand = not (on_gpu() if device.startswith("cuda") else kernels.ready())
    folder = found.folder
    # Two bits and the parameters become 32 bits.
    needed = sum(file.stat().st_size for file in folder.glob("*.safetensors")) * (10 if expand else 1)
    _check_memory(name, needed, device)
    model, tokenizer = found.load(device=device)
    layers = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    stored = _bytes(model)
    stated: LbllmConfig = model.config.quantization_config
    expanded = 0
    if expand:
        for layer in layers:
            layer.keep_dense(torch.float32)
            assert layer.dense is not None
            expanded += layer.dense.nbytes
    weights = weight_count(model) + sum(layer.in_features * layer.out_features for layer in layers)
    quant = stated.format
    precision = f"{FORMAT_NAMES[quant.format]}A{quant.act_bits}KV{quant.kv_bits}, {named_groups(layers)}"
    if quant.embedding_bits < 16:
        precision += f", embeddings in {quant.embedding_bits} bits"
    return Loaded(model, tokenizer, True, precision, weights, stored, expanded, stated.bpw or 0.0)


def _check_memory(name: str, needed: int, device: str) -> None:
    """Raise ResourceError if so many bytes are not free; otherwise the system could kill the whole process."""
    free = free_memory(device)
    if needed > free:
        raise ResourceError(
            f"{name} needs about {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "choose a smaller model, or end a run or another program first"
        )


def _bytes(model: PreTrainedModel) -> int:
    """Bytes of the tensors in a checkpoint of the model; shared tensors count once."""
    packed = [layer for layer in model.modules() if isinstance(layer, PackedLinear)]
    tensors = [*model.parameters(), *(buffer for layer in packed for buffer in layer.buffers())]
    return sum({tensor.data_ptr(): tensor.nbytes for tensor in tensors}.values())
