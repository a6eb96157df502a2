"""Thousands of damaged inputs for each reader: no exception but lbllm's own, none that takes long."""

from __future__ import annotations

import gzip
import itertools
import json
import random
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load as load_tensors

from lbllm.checkpoints import hf
from lbllm.checkpoints.seal import add_seal
from lbllm.checkpoints.weights import WEIGHTS
from lbllm.config import DEFAULT_PRESET, RunConfig, arguments, make_config, parse_config, read_settings
from lbllm.errors import CorpusError
from lbllm.json_input import replaced
from lbllm.presets import PRESETS
from lbllm.quant.plan import block_formats
from lbllm.stages.block_state import BlockState, restore
from lbllm.stages.block_store import BlockStore
from lbllm.stages.distill import binary_layers
from lbllm.texts.corpus import load_corpus
from lbllm.texts.documents import read_beginning, read_documents
from tests.helpers.fuzz import changed_bytes, changed_document, fuzz
from tests.helpers.tiny_models import SENTENCES, tiny_tokenizer
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher

pytestmark = pytest.mark.random
LAYERS = [f"model.layers.{block}.{name}" for block in (0, 29) for name in ("self_attn.q_proj", "mlp.down_proj")]


@pytest.fixture
def say(capsys: pytest.CaptureFixture[str]) -> Callable[[str], None]:
    def say(text: str) -> None:
        with capsys.disabled():
            print(f"\n{text}", end="")  # noqa: T201 - what the test is there to tell

    return say


def settings(rng: random.Random) -> dict[str, Any]:
    """A valid document of settings."""
    changes: dict[str, Any] = {"seed": rng.randrange(100), "quant": {"overrides": {"*.v_proj": {"group_size": 32}}}}
    changes["quant"]["skip"] = ["*.k_proj"]
    start = {"start": "shipped", "stages": ["e2e"]} if rng.random() < 0.2 else {}
    document = make_config(rng.choice(list(PRESETS)), changes | start).model_dump(mode="json")
    if rng.random() < 0.3:  # a few settings of a preset
        kept = rng.sample(sorted(document), 4)
        return {key: document[key] for key in kept}
    return document


def use(config: RunConfig) -> None:
    """What commands and pages do with settings: all of it has to work for settings that were accepted."""
    assert parse_config(json.loads(config.model_dump_json())) == config
    assert all(isinstance(word, str) for word in arguments(config))
    for layer in LAYERS:
        config.quant.layer(layer)
    assert config.run_name
    assert config.tokens > 0
    assert config.fixed_by_start() is not None
    assert [config.precision(stage) for stage in config.origins]


def test_settings_documents(say: Callable[[str], None]) -> None:
    def make(rng: random.Random) -> tuple[Any, tuple[str, ...]]:
        document = settings(rng)
        if rng.random() < 0.2:
            keys = (
                "quant.group_size",
                "wat.tokens",
                "stages",
                "quant.overrides",
                "x.y.z",
                "a" + ".b" * 2_000,
                "",
                "model",
            )
            given = written(changed_document(rng, {"a": [1, "x"]})).decode()
            return document, (f"{rng.choice(keys)}={given}", changed_bytes(rng, b"wat.epochs=4").decode("latin-1"))
        return changed_document(rng, document), ()

    def read(case: tuple[Any, tuple[str, ...]]) -> None:
        document, assignments = case
        if not assignments:
            use(parse_config(document))
        use(make_config("quick", {key: document[key] for key in document if key != "preset"}, assignments))

    fuzz("config", make, lambda case: isinstance(case[0], dict), read, say)


def test_settings_files(say: Callable[[str], None]) -> None:
    def make(rng: random.Random) -> bytes:
        document = settings(rng)
        if rng.random() < 0.75:
            document = changed_document(rng, document)
        data = written(document, indent=rng.choice((None, 2)))
        match rng.randrange(10):
            case 0 | 1:
                return changed_bytes(rng, data)
            case 2:
                return data.decode().encode(rng.choice(("utf-8-sig", "utf-16", "utf-32")))
            case 3:
                return data.replace(b"1", rng.choice((b"1e999", b"-1", b"1.0", b"9" * 5_000, b"Infinity")), 1)
        return data

    def read(data: bytes) -> None:
        named, document = read_settings(data, "settings.json")
        use(make_config(named or DEFAULT_PRESET, document))

    fuzz("settings", make, is_json, read, say)


def written(document: Any, **options: Any) -> bytes:
    """The document as JSON; an integer of thousands of digits, which Python doesn't write, becomes a smaller one."""
    try:
        return json.dumps(document, **options).encode()
    except (ValueError, RecursionError):
        return repr(document)[:10_000].encode("utf-8", "replace")


def is_json(data: bytes) -> bool:
    try:
        return isinstance(json.loads(data), dict)
    except (ValueError, RecursionError):
        return False


def header_of(data: bytes) -> Any:
    """The header of a safetensors file; None if it can't be read."""
    try:
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length]) if length <= len(data) - 8 else None
        return header if isinstance(header, dict) else None
    except (struct.error, ValueError, RecursionError):
        return None


def with_header(data: bytes, header: Any) -> bytes:
    (length,) = struct.unpack("<Q", data[:8])
    new = written(header)
    return struct.pack("<Q", len(new)) + new + data[8 + length :]


def changed_header(rng: random.Random, data: bytes) -> bytes:
    """The file with another header, sometimes with a wrong length or other changed bytes."""
    header = header_of(data)
    entry = rng.choice(list(header))
    match rng.randrange(8):
        case 0:
            return struct.pack("<Q", rng.choice((0, 1, 2**63, 2**64 - 1, len(data), rng.randrange(1_000)))) + data[8:]
        case 1:
            return changed_bytes(rng, data)
        case 2:
            header[rng.choice(("x", "", "../x", "__metadata__"))] = header[entry]
        case 3 if entry != "__metadata__":
            header[entry]["shape"] = rng.choice(([], [0], [2**40, 2**40], [1], header[entry]["shape"][::-1]))
        case 4 if entry != "__metadata__":
            header[entry]["dtype"] = rng.choice(("F64", "BOOL", "F8_E4M3", "U8", "I64", "X", ""))
        case 5 if entry != "__metadata__":
            header[entry]["data_offsets"] = rng.choice(([0, 0], [0, len(data)], [-1, 4], [8, 4], [2**63, 2**64]))
        case _:
            header = changed_document(rng, header)
    return with_header(data, header)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    run_tiny(run_config(), folder, tiny_teacher("llama"))
    return folder


def test_headers_of_safetensors(run_folder: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    """Of block states, and every twentieth time of a whole checkpoint, which takes longer to load."""
    state = (run_folder / "blocks" / "ptq-0000.safetensors").read_bytes()
    checkpoint = run_folder / "checkpoint"
    weights = (checkpoint / WEIGHTS).read_bytes()
    config = (checkpoint / "config.json").read_bytes()
    store = BlockStore(tmp_path, None)
    numbers = itertools.count()

    def make(rng: random.Random) -> tuple[bool, bytes]:
        whole = next(numbers) % 20 == 19
        return whole, changed_header(rng, weights if whole else state)

    def read(case: tuple[bool, bytes]) -> None:
        whole, data = case
        if not whole:
            store.path("ptq", 0).write_bytes(data)
            store.load("ptq", 0)
            return
        (checkpoint / WEIGHTS).write_bytes(data)
        # As if whoever changed the file had sealed it again.
        document = json.loads(config)
        add_seal(document, checkpoint)
        (checkpoint / "config.json").write_text(json.dumps(document))
        hf.load(checkpoint)

    try:
        fuzz("headers", make, lambda case: header_of(case[1]) is not None, read, say)
    finally:
        (checkpoint / WEIGHTS).write_bytes(weights)
        (checkpoint / "config.json").write_bytes(config)


def test_block_states(run_folder: Path, tmp_path: Path, say: Callable[[str], None]) -> None:
    """States of changed tensors, each with a right hash, as a run restores them."""
    teacher, quant = tiny_teacher("llama"), run_config().quant
    _, blocks, formats = block_formats(teacher.model, quant)
    stages = ("ptq", "wat", "aar")
    states = {stage: (run_folder / "blocks" / f"{stage}-0000.safetensors").read_bytes() for stage in stages}
    store = BlockStore(tmp_path, "0" * 64)

    def make(rng: random.Random) -> bytes:
        data = states[rng.choice(stages)]
        tensors = load_tensors(data)
        for _ in range(rng.randint(0, 2)):
            name = rng.choice(list(tensors))
            tensor = tensors[name]
            match rng.randrange(8):
                case 0:
                    del tensors[name]
                case 1:
                    tensors[name + rng.choice(("x", ".act", ""))] = tensor.clone()
                case 2:
                    tensors[name] = tensors[rng.choice(list(tensors))].clone()
                case 3:
                    tensors[name] = tensor.flatten()[: rng.randrange(tensor.numel() + 1)].clone()
                case 4:
                    tensors[name] = tensor.to(rng.choice((torch.float64, torch.bool, torch.int64, torch.uint8)))
                case 5:
                    tensors[name] = torch.full(tensor.shape, rng.choice((255, 0, 4, 3))).to(tensor.dtype)
                case 6 if tensor.is_floating_point():
                    tensors[name] = torch.full(tensor.shape, rng.choice((float("nan"), float("inf"), 1e30))).to(
                        tensor.dtype
                    )
                case 7:
                    tensors[name] = tensor.mT.contiguous() if tensor.ndim > 1 else tensor[None].clone()
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        # Like a run that saves its block, so with a right hash.
        store.save("ptq", 0, BlockState(kept, 0.5, 0.25, False))
        data = store.path("ptq", 0).read_bytes()
        if rng.random() < 0.2:
            header = header_of(data)
            header["__metadata__"] = changed_document(rng, header["__metadata__"])
            data = with_header(data, header)
        return changed_bytes(rng, data) if rng.random() < 0.2 else data

    def read(data: bytes) -> None:
        store.path("ptq", 0).write_bytes(data)
        state = store.load("ptq", 0)
        assert state is not None
        block = restore(blocks[0], formats[0], state.tensors, quant.tail_steps)
        for layer in binary_layers(block).values():
            layer.keep_dense()

    fuzz("states", make, lambda data: header_of(data) is not None, read, say)


def text_file(rng: random.Random) -> tuple[str, bytes]:
    """The name and content of a valid text, or of one with changed rows."""
    texts = [" ".join(rng.choices(SENTENCES, k=rng.randrange(1, 9))) for _ in range(rng.randrange(1, 20))]
    if rng.random() < 0.3:
        return rng.choice(("a.txt", "a.md", "a.RAW")), "\n\n".join(texts).encode()
    rows: list[Any] = [{"text": text, "id": number} for number, text in enumerate(texts)]
    if rng.random() < 0.4:
        rows = [{"messages": [{"role": role, "content": text} for role in ("user", "assistant")]} for text in texts]
    for number in range(len(rows)):
        if rng.random() < 0.05:
            rows[number] = changed_document(rng, [rows[number]])
            rows[number] = rows[number][0] if rows[number] else None
    return rng.choice(("a.jsonl", "A.JSONL")), b"\n".join(map(written, rows))


def test_texts(tmp_path: Path, say: Callable[[str], None]) -> None:
    tokenizer = tiny_tokenizer()

    def make(rng: random.Random) -> tuple[str, bytes]:
        name, data = text_file(rng)
        match rng.randrange(14):
            case 0 | 1:
                data = changed_bytes(rng, data)
            case 2:
                data = data.decode().encode(rng.choice(("utf-8-sig", "utf-16", "utf-16-le", "utf-32", "utf-7")))
            case 3:
                data = data.replace(b"\n", rng.choice((b"\r\n", b"\r", b"\n\n", "\u2028".encode(), b"\0")))
            case 4 | 5:
                return name + rng.choice((".gz", ".GZ")), gzip.compress(data, mtime=0)
            case 6:
                return f"{name}.gz", changed_bytes(rng, gzip.compress(data, mtime=0))
            case 7:
                name = rng.choice(("a.json", "a.csv", "a", "a.gz", "a.txt", "a.jsonl"))
        return name, data

    def parses(case: tuple[str, bytes]) -> bool:
        name, data = case
        try:
            text = (gzip.decompress(data) if name.lower().endswith(".gz") else data).decode()
            if "jsonl" in name.lower():
                return all(isinstance(json.loads(line), dict) for line in text.splitlines() if line.strip())
            return "\0" not in text
        except (ValueError, OSError, EOFError, zlib.error, RecursionError):
            return False

    def read(case: tuple[str, bytes]) -> None:
        name, data = case
        path = tmp_path / name
        path.write_bytes(data)
        try:
            documents = [document for document in read_documents(path) if not document.empty]
        except CorpusError:
            # What training refuses, evaluation refuses, too.
            with pytest.raises(CorpusError):
                read_beginning(path, 10**9)
            raise
        begun = read_beginning(path, 10**9)
        assert begun.whole
        assert sum(document.size for document in documents) <= len(begun.text)
        replaced(begun.text).encode()  # can be stored
        corpus = load_corpus(str(path), tokenizer, seq_len=8, tokens=10**6)
        assert corpus.tokens > 0

    fuzz("texts", make, parses, read, say)
