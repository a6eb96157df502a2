"""Small files of a run that a resumed run reads again: what is damaged is not used."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lbllm.config import make_config
from lbllm.pipeline.evaluated import read_evaluated, write_evaluated
from lbllm.pipeline.run import _recorded_precision

CONFIG = make_config("quick")
KNOWN = {"teacher": 20.5, "ptq": float("inf"), "wat": 42.25}


def test_perplexities_are_read_as_they_were_written(tmp_path: Path) -> None:
    assert read_evaluated(tmp_path, CONFIG) == {}
    write_evaluated(tmp_path, CONFIG, KNOWN)
    assert read_evaluated(tmp_path, CONFIG) == KNOWN


def test_those_of_earlier_versions_have_no_hash(tmp_path: Path) -> None:
    (tmp_path / "evaluated.json").write_text(json.dumps(KNOWN))
    assert read_evaluated(tmp_path, CONFIG) == KNOWN


def test_no_changed_byte_changes_a_figure(tmp_path: Path) -> None:
    write_evaluated(tmp_path, CONFIG, KNOWN)
    file = tmp_path / "evaluated.json"
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in (1, 4, 16):
            file.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert read_evaluated(tmp_path, CONFIG) in ({}, KNOWN)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"5",
        b'{"teacher": "20"}',
        b'{"teacher": true}',
        b'{"teacher": -1}',
        b'{"teacher": NaN}',
        b'{"somebody": 20.5}',
        b'{"teacher": [1]}',
        b"[" * 100_000,
    ],
)
def test_other_content_is_measured_again(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "evaluated.json").write_bytes(content)
    assert read_evaluated(tmp_path, CONFIG) == {}


@pytest.mark.parametrize(
    ("content", "precision"),
    [(b"no", "no"), (b"bf16\n", "bf16"), (b"", None), (b"\xff", None), (b"fp8", None), (b"n", None)],
)
def test_a_damaged_precision_is_chosen_again(tmp_path: Path, content: bytes, precision: str | None) -> None:
    assert _recorded_precision(tmp_path) is None
    (tmp_path / "precision").write_bytes(content)
    assert _recorded_precision(tmp_path) == precision
