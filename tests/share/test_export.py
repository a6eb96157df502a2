"""Export: what is written holds what the checkpoint holds, loads where it should, and appears whole or not at all."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lbllm
from lbllm.checkpoints.dense import dense_copy
from lbllm.checkpoints.find import find_checkpoint, teacher_of
from lbllm.checkpoints.record import RECORD, RunRecord, read_record, write_record
from lbllm.commands.main import main
from lbllm.errors import CheckpointError, ConfigError, ModelError, ResourceError, RunError
from lbllm.events import Evaluated, RunStarted
from lbllm.measure.estimate import estimate
from lbllm.models.experts import split_experts
from lbllm.models.teacher import load_teacher
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.store import Run, RunStore
from lbllm.sections import QuantConfig
from lbllm.share.export import ExportKind, export
from tests.helpers.tiny_packed import tiny_checkpoint
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids


@pytest.fixture(scope="module")
def dense(store: RunStore, run: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(find_checkpoint(run.id, store), "dense", tmp_path_factory.mktemp("dense") / "out").path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(token_ids(2, seed=1)).logits


def level_by_level(tensors: dict[str, torch.Tensor], name: str, columns: int, group: int) -> torch.Tensor:
    """A packed layer's weight (out, in) in float64, by the format's own equation, from the bytes of its file."""
    planes = np.unpackbits(tensors[f"{name}.weight"].numpy(), axis=-1, count=columns, bitorder="little")
    params = tensors[f"{name}.params"].numpy().astype(np.float64)
    sign = 2.0 * planes[:, 0] - 1
    alpha_0, mu_0, alpha_1, mu_1 = (np.repeat(params[..., k], group, axis=1)[:, :columns] for k in range(4))
    weight = np.where(planes[:, 1] == 1, alpha_0 * sign + mu_0, alpha_1 * sign + mu_1)
    return torch.from_numpy(weight)


def test_the_checkpoint_says_what_its_run_did(store: RunStore, run: Run) -> None:
    record = read_record(run.folder / "checkpoint")
    events = [stored.event for stored in store.events(run.id)]
    (started,) = (event for event in events if isinstance(event, RunStarted))
    measured = tuple(event for event in events if isinstance(event, Evaluated))
    assert [event.what for event in measured] == ["teacher", "ptq", "wat", "aar"]
    assert record.evaluations == measured
    assert (record.settings, record.corpus_hash, record.corpus_tokens) == (
        run.config,
        started.corpus_hash,
        started.tokens,
    )
    assert (record.bpw, record.base_model) == (started.bpw, None)


def test_a_checkpoint_without_the_record_still_has_its_settings(run: Run, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.folder / "checkpoint", tmp_path / "old"))
    (folder / RECORD).unlink()
    record = read_record(folder)
    # Which device a run had is not part of what it made.
    assert record.settings == run.config.model_copy(update={"device": "auto"})
    assert (record.evaluations, record.corpus_hash) == ((), None)
    (folder / RECORD).write_text('{"version": 1, "evaluations": [')
    with pytest.raises(CheckpointError, match=RECORD):
        read_record(folder)


def test_packed_is_the_same_checkpoint_with_all_that_was_measured(store: RunStore, run: Run, tmp_path: Path) -> None:
    later = Evaluated(what="aar", text="wikitext2, 3 windows of 32 tokens", perplexity=7.0, tokens=93, kl=0.5)
    store.append(run.id, later)
    exported = export(find_checkpoint(run.id, store), "packed", tmp_path / "deep" / "out")
    before = run.folder / "checkpoint"
    for path in before.iterdir():
        if path.name not in (RECORD, "config.json"):
            assert (exported.path / path.name).read_bytes() == path.read_bytes()
    stated, given = (json.loads((folder / "config.json").read_text()) for folder in (exported.path, before))
    del stated["quantization_config"]["provenance"], given["quantization_config"]["provenance"]
    assert stated == given
    record = read_record(exported.path)
    measured = (*read_record(before).evaluations, later)
    assert [one.model_copy(update={"text": ""}) for one in record.evaluations] == [
        one.model_copy(update={"text": ""}) for one in measured
    ]
    assert record.evaluations[-1] == later
    assert record.run == run.id
    assert exported.disk_bytes == sum(path.stat().st_size for path in exported.path.iterdir())
    assert torch.equal(logits(lbllm.load(exported.path)[0]), logits(lbllm.load(before)[0]))
    # What was exported can be exported again, by its folder's name.
    again = export(find_checkpoint(str(exported.path), store), "packed", tmp_path / "again")
    assert read_record(again.path) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "deep"]


@pytest.mark.parametrize("kind", ["packed", "dense", "gguf", "space"])
def test_files_of_this_machine_are_named_by_their_last_part(
    store: RunStore, run: Run, kind: ExportKind, tmp_path: Path
) -> None:
    text = Path(run.config.corpus)
    measured = f"{text}, 2 windows of 32 tokens"
    store.append(run.id, Evaluated(what="aar", text=measured, perplexity=7.0, tokens=62))
    out = export(find_checkpoint(run.id, store), kind, tmp_path / "out").path
    for path in out.rglob("*"):
        if path.is_file():
            assert str(text.parent).encode() not in path.read_bytes(), path
    if kind != "packed":
        return
    stated = json.loads((out / "config.json").read_text())["quantization_config"]["provenance"]
    assert (stated["model"], stated["run"]["model"], stated["run"]["corpus"]) == ("teacher", "teacher", text.name)
    record = read_record(out)
    assert record.settings is not None
    assert record.settings.model_copy(update={"model": run.config.model, "corpus": str(text)}) == run.config
    assert record.settings.corpus == text.name
    assert record.evaluations[-1].text == f"{text.name}, 2 windows of 32 tokens"
    assert {one.text.partition(",")[0] for one in record.evaluations[:4]} == {f"held-out part of {text.name}"}


def of_a_space(kind: ExportKind, run: Run) -> dict[str, Any]:
    """The options that an export of a foreign folder needs."""
    return {"teacher": run.config.model} if kind == "space" else {}


@pytest.fixture
def with_templates(run: Run, tmp_path: Path) -> Path:
    """The checkpoint, saved anew with two chat templates by name."""
    folder = tmp_path / "several"
    model, tokenizer = lbllm.load(run.folder / "checkpoint")
    tokenizer.chat_template = TEMPLATES
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


TEMPLATES = {
    "default": "{% for message in messages %}{{ message.content }}{% endfor %}",
    "tool_use": "{% for message in messages %}tool {{ message.content }}{% endfor %}",
}


@pytest.mark.parametrize("kind", ["packed", "dense", "gguf", "space"])
def test_every_chat_template_is_kept(
    run: Run, store: RunStore, with_templates: Path, kind: ExportKind, tmp_path: Path
) -> None:
    found = find_checkpoint(str(with_templates), store)
    out = export(found, kind, tmp_path / "out", **of_a_space(kind, run)).path
    if kind == "gguf":  # llama.cpp uses one
        (file,) = out.glob("*.gguf")
        assert GGUFReader(file).fields["tokenizer.chat_template"].contents() == TEMPLATES["default"]
        return
    tokenizer = AutoTokenizer.from_pretrained(out / "checkpoint" if kind == "space" else out)
    assert tokenizer.chat_template == TEMPLATES
    if kind == "packed":
        assert "additional_chat_templates/tool_use.jinja" in (out / "README.md").read_text()


@pytest.mark.parametrize("kind", ["packed", "dense", "gguf", "space"])
@pytest.mark.parametrize("linked", ["model.safetensors", "chat_template.jinja", "notes", "gone.txt"])
def test_links_out_of_a_checkpoint_are_refused(
    run: Run, store: RunStore, kind: ExportKind, linked: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(run.folder / "checkpoint", tmp_path / "foreign"))
    outside = tmp_path / "outside"
    outside.mkdir()
    target = outside if linked == "notes" else outside / linked
    if (folder / linked).exists():
        shutil.move(folder / linked, target)
    elif linked == "notes":
        (outside / "secret.txt").write_text("a secret")
    (folder / linked).symlink_to(target)
    with pytest.raises(ResourceError, match=f"{linked} is a link to"):
        export(find_checkpoint(str(folder), store), kind, tmp_path / "out", **of_a_space(kind, run))
    assert not (tmp_path / "out").exists()


def test_links_of_the_hub_s_cache_are_followed(run: Run, store: RunStore, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "models--a--b" / "blobs", tmp_path / "models--a--b" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for path in (run.folder / "checkpoint").iterdir():
        shutil.copyfile(path, blobs / path.name)
        (snapshot / path.name).symlink_to(Path("..", "..", "blobs", path.name))
    out = export(find_checkpoint(str(snapshot), store), "packed", tmp_path / "out").path
    assert not any(path.is_symlink() for path in out.iterdir())
    assert (out / "model.safetensors").read_bytes() == (blobs / "model.safetensors").read_bytes()


def test_the_teacher_of_an_own_run_is_its_setting_also_of_a_copy(run: Run, store: RunStore, tmp_path: Path) -> None:
    assert teacher_of(find_checkpoint(run.id, store), store) == run.config.model
    copy = Path(shutil.copytree(run.folder / "checkpoint", tmp_path / "copy"))
    assert teacher_of(find_checkpoint(str(copy), store), store) == run.config.model
    # Other weights than those of the run that they name.
    data = bytearray((copy / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (copy / "model.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="--teacher"):
        teacher_of(find_checkpoint(str(copy), store), store)


def test_dense_holds_what_the_bits_stand_for(run: Run, dense: Path) -> None:
    packed, tensors = load_file(run.folder / "checkpoint" / "model.safetensors"), load_file(dense / "model.safetensors")
    layers = {name.removesuffix(".params") for name in packed if name.endswith(".params")}
    assert len(layers) == 14
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if layer in layers:
            wanted = level_by_level(packed, layer, tensor.shape[1], run.config.quant.group_size)
            torch.testing.assert_close(tensor.double(), wanted, rtol=2**-8, atol=0)  # bfloat16 has 8 bits
        else:
            assert torch.equal(tensor, packed[name])
    kept = {name for name in packed if name.rpartition(".")[0].removesuffix(".quantizer") not in layers}
    assert tensors.keys() == kept | {f"{layer}.weight" for layer in layers}


FRESH = """
import sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, ids, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
assert AutoTokenizer.from_pretrained(folder).chat_template
with torch.no_grad():
    torch.save(model(torch.load(ids)).logits, out)
assert not any(name.startswith("lbllm") for name in sys.modules)
"""


def test_dense_answers_as_the_teacher_with_these_weights_where_nobody_knows_lbllm(
    run: Run, dense: Path, tmp_path: Path
) -> None:
    torch.save(token_ids(2, seed=1), tmp_path / "ids")
    command = [sys.executable, "-c", FRESH, str(dense), str(tmp_path / "ids"), str(tmp_path / "logits")]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    teacher = load_teacher(run.config.model).model
    teacher.load_state_dict(load_file(dense / "model.safetensors"), strict=False)
    torch.testing.assert_close(torch.load(tmp_path / "logits"), logits(teacher), rtol=1e-5, atol=1e-5)
    document = json.loads((dense / "config.json").read_text())
    assert "quantization_config" not in document
    assert "transformers_weights" not in document


@pytest.mark.parametrize("architecture", ["gpt2", "gemma3", "llama_bias"])
def test_dense_answers_like_the_a16_model(architecture: str, tmp_path: Path) -> None:
    config = run_config(stages=["ptq"])
    run_tiny(config, tmp_path / "run", tiny_teacher(architecture))
    model, tokenizer = lbllm.load(tmp_path / "run" / "checkpoint")
    wanted = logits(model)
    if architecture == "gpt2":  # stored transposed
        name, layer = next((n, m) for n, m in model.named_modules() if isinstance(m, PackedLinear))
        assert torch.equal(dense_copy(model).get_parameter(f"{name}.weight"), layer.dequantize().t().bfloat16())
    path = export(find_checkpoint(str(tmp_path / "run" / "checkpoint")), "dense", tmp_path / "out").path
    found = logits(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    # Weights are rounded to bfloat16; another weight in one place would move logits by a part of their spread.
    assert float((found - wanted).std()) < 0.02 * float(wanted.std())
    assert tokenizer("a b")["input_ids"] == AutoTokenizer.from_pretrained(path)("a b")["input_ids"]


def test_what_is_there_is_not_touched(store: RunStore, run: Run, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for name in ("out", "file"):
        with pytest.raises(ConfigError, match=name):
            export(find_checkpoint(run.id, store), "dense", tmp_path / name)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["mine"]


@pytest.mark.parametrize("kind", ["packed", "dense", "gguf"])
def test_a_damaged_checkpoint_is_not_passed_on(store: RunStore, run: Run, kind: ExportKind, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(run.folder / "checkpoint", tmp_path / "checkpoint"))
    weights = bytearray((folder / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (folder / "model.safetensors").write_bytes(weights)
    with pytest.raises(CheckpointError, match="hash"):
        export(find_checkpoint(str(folder), store), kind, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_disk_that_fills_up_leaves_nothing(
    store: RunStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = find_checkpoint(run.id, store)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", full)
        with pytest.raises(ResourceError, match="No space left"):
            export(source, "dense", tmp_path / "out")
    with monkeypatch.context() as patched:
        patched.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6))
        with pytest.raises(ResourceError, match=r"0\.03 GB"):
            export(source, "dense", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_names_that_lead_nowhere(store: RunStore, run: Run, tmp_path: Path) -> None:
    assert find_checkpoint(str(run.folder), store) == find_checkpoint(run.id, store)
    with pytest.raises(ModelError, match=r"no-such-thing.*runs list"):
        find_checkpoint("no-such-thing", store)
    with pytest.raises(CheckpointError, match=tmp_path.name):
        find_checkpoint(str(tmp_path), store)
    waiting = store.create(run.config)
    with pytest.raises(RunError, match=f"{waiting.id} is queued"):
        find_checkpoint(waiting.id, store)


def test_gguf_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    run_tiny(run_config(stages=["ptq"]), tmp_path / "run", tiny_teacher("gpt2"))
    source = find_checkpoint(str(tmp_path / "run" / "checkpoint"))
    with pytest.raises(ModelError, match=r"gpt2.*dense"):
        export(source, "gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command(
    store: RunStore, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LBLLM_HOME", str(store.root.parent))
    out = str(tmp_path / "out")
    assert main(["export", run.id, "--to", "gguf", "--out", out, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["path"], document["kind"]) == (out, "gguf")
    assert sorted(path.name for path in Path(out).iterdir()) == ["Modelfile", "README.md", "out-BF16.gguf"]
    assert main(["export", run.id, "--to", "gguf", "--out", out]) == 1
    assert out in capsys.readouterr().err
    assert main(["export", run.id, "--to", "onnx", "--out", str(tmp_path / "b")]) == 2


def test_the_card_says_what_the_experts_of_a_mixture_take(tmp_path: Path) -> None:
    packed, _ = tiny_checkpoint(tmp_path, "qwen3_moe", QuantConfig(group_size=16))
    settings = run_config()
    write_record(packed, RunRecord(settings=settings))
    out = export(find_checkpoint(str(packed)), "packed", tmp_path / "out").path
    card = (out / "README.md").read_text()
    teacher = tiny_teacher("qwen3_moe")
    split_experts(teacher.model)
    expected = estimate(settings, model=teacher.model, rate=1e11)
    assert expected.experts is not None
    share = 100 * expected.experts.weights / expected.weights
    assert f"Experts: 2 of 4 compute a token. They are {share:.0f} % of the binarized weights" in card
    assert "of the time that its run takes, by estimate" in card
