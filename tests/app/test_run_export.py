"""The export section of the Runs page, without a browser: what it writes, where, and what it says when it can't."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from streamlit.testing.v1 import AppTest

from lbllm.checkpoints.hf import is_checkpoint
from lbllm.runs.store import Run, RunStore
from tests.helpers.finished_run import finished_run
from tests.helpers.homes import own_home


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("LBLLM_HOME", str(own_home(tmp_path / "home", "kernels")))
    monkeypatch.setenv("LBLLM_ROOT", str(tmp_path / "root"))
    (tmp_path / "root").mkdir()
    return finished_run(RunStore(tmp_path / "home" / "runs"), tmp_path)


def section() -> None:
    from app.runs.export import show_export
    from app.view import store

    show_export(store(), store().all()[0])


def said(text: str) -> str:
    """A message as it is read, its Markdown escapes taken out."""
    return re.sub(r"\\(.)", r"\1", text)


def test_a_finished_run_is_exported_under_the_root_alone(run: Run, tmp_path: Path) -> None:
    app = AppTest.from_function(section, default_timeout=60).run()
    assert app.text_input[0].value == "exports/tiny-one-packed"
    app.button[0].click().run()
    assert not app.exception
    target = tmp_path / "root" / "exports" / "tiny-one-packed"
    assert is_checkpoint(target)
    assert str(target) in said(app.success[0].value)
    # The same once more, somewhere else than under the root, and in a folder that can't be made.
    app.button[0].click().run()
    assert not app.success
    assert "not an empty folder" in said(app.error[0].value)
    app.radio[0].set_value("dense").run()
    assert app.text_input[0].value == "exports/tiny-one-dense"
    app.text_input[0].set_value(str(tmp_path / "elsewhere")).run()
    app.button[0].click().run()
    assert "LBLLM_ROOT" in said(app.error[0].value)
    assert not (tmp_path / "elsewhere").exists()
    app.text_input[0].set_value("exports/tiny-one-packed/config.json/below").run()
    app.button[0].click().run()
    assert "can't be written" in said(app.error[0].value)
    assert not app.exception


def test_a_gguf_file_has_a_type_with_its_size(run: Run, tmp_path: Path) -> None:
    app = AppTest.from_function(section, default_timeout=60).run()
    assert not app.selectbox
    app.radio[0].set_value("gguf").run()
    (option,) = app.selectbox[0].options  # rows of 48 and of 90 weights are no whole blocks of any other type
    assert re.fullmatch(r"BF16 \(16 bits a weight\), [\d.]+ [kM]B", option)
    app.button[0].click().run()
    assert not app.exception
    files = {path.name for path in (tmp_path / "root" / "exports" / "tiny-one-gguf").iterdir()}
    assert files == {"Modelfile", "README.md", "tiny-one-gguf-BF16.gguf"}
