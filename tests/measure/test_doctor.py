"""The report on the installation: what is whole is ok, what is broken is a fault with a way out."""

from __future__ import annotations

import hashlib
import json
from importlib import metadata
from pathlib import Path

import pytest
from torch import Tensor

from lbllm.commands.main import main
from lbllm.config import make_config
from lbllm.measure.doctor import Check, checks
from lbllm.quant.packed_layer import PackedLinear
from lbllm.runs.store import RunStore
from tests.helpers.homes import own_home


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    home = own_home(tmp_path / "home", "kernels")
    monkeypatch.setenv("LBLLM_HOME", str(home))
    return home


def named(name: str) -> Check:
    """The one check whose name begins so."""
    (found,) = [check for check in checks() if check.name.startswith(name)]
    return found


def test_a_sound_machine_has_no_fault(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["faults"] == 0
    found = {check["name"]: check for check in report["checks"]}
    assert found["torch"]["state"] == found["transformers"]["state"] == found["home"]["state"] == "ok"
    tested = [check for name, check in found.items() if name.startswith("self-test on cpu")]
    assert len(tested) >= 4
    assert {check["state"] for check in tested} == {"ok"}


def test_the_text_names_no_home_folder(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "kernels" in text
    assert str(home) not in text
    assert "hf_secret" not in text


def test_a_layer_that_computes_wrongly_is_a_fault(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    forward = PackedLinear.forward

    def nearly(layer: PackedLinear, x: Tensor) -> Tensor:
        return forward(layer, x) * 1.001

    monkeypatch.setattr(PackedLinear, "forward", nearly)
    assert main(["doctor"]) == 1
    text = capsys.readouterr().out
    assert "fault  self-test on cpu" in text
    assert "LBLLM_KERNELS=none" in text


def test_a_version_outside_the_range_is_a_fault(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    version = metadata.version
    monkeypatch.setattr(metadata, "version", lambda name: "5.24.0" if name == "transformers" else version(name))
    check = named("transformers")
    assert (check.state, check.value) == ("fault", "5.24.0")
    assert "pip install 'transformers" in check.advice


def test_without_a_compiler_it_says_what_is_slow(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("CXX", "")
    check = named("compiler")
    assert check.state == "note"
    assert "g++" in check.advice


def test_a_changed_model_in_the_cache_is_a_fault(home: Path) -> None:
    whole, changed, old = (home / "models" / name for name in ("a-0123-2", "b-0123-2", "c-0123"))
    for folder in (whole, changed, old):
        folder.mkdir(parents=True)
        (folder / "model.safetensors").write_bytes(b"weights")
        hashed = hashlib.sha256(b"weights").hexdigest()
        stated = {} if folder == old else {"files": {"model.safetensors": hashed}}
        (folder / "source.json").write_text(json.dumps(stated))
    (changed / "model.safetensors").write_bytes(b"Weights")
    found = {check.name: check for check in checks() if check.section == "models"}
    assert [found[path.name].state for path in (whole, changed, old)] == ["ok", "fault", "note"]
    assert "made anew" in found[changed.name].advice


def test_a_damaged_run_store_is_a_fault_and_a_look_repairs_nothing(home: Path) -> None:
    store = RunStore(home / "runs")
    store.create(make_config("preview"), name="first")
    store.close()
    file = home / "runs" / "runs.db"
    data = bytearray(file.read_bytes())
    data[100:] = b"x" * (len(data) - 100)
    file.write_bytes(data)
    found = list(checks())
    assert file.read_bytes() == data
    (fault,) = [check for check in found if check.state == "fault"]
    assert fault.name == "run store"
    assert "makes it anew" in fault.advice
