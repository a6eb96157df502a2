"""Other methods among the models of an evaluation: their names, their sizes, and what they leave as it is."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lbllm.baselines.layer import Settings
from lbllm.baselines.methods import METHODS, quantize_blocks
from lbllm.errors import LbllmError
from lbllm.evaluation.baseline import Baseline, Kind, baseline, gptq_beside, load_any
from lbllm.models.teacher import load_teacher
from lbllm.texts.corpus import load_corpus
from tests.helpers.tiny_models import save_tiny


@given(
    kind=st.sampled_from(get_args(Kind)),
    teacher=st.text(min_size=1),
    bits=st.integers(1, 8),
    group_size=st.sampled_from((-1, 1, 16, 128, 9_999_999)),
)
def test_a_name_is_read_as_it_was_written(kind: Kind, teacher: str, bits: int, group_size: int) -> None:
    made = Baseline(kind, teacher, bits, group_size)
    assert baseline(made.name) == made


@pytest.mark.parametrize("name", ["a", "gptq", "gptq:9:16:a", "gptq:2:0:a", "gptq:2:16:", "hqq:2:16:a", "rtn:2:16:a"])
def test_other_names_are_no_baselines(name: str) -> None:
    assert baseline(name) is None


@pytest.mark.parametrize(
    ("bits", "size"),
    [(1.1, (2, 128)), (2.27, (2, 64)), (2.5, (2, 32)), (2.98, (3, 128)), (3.5, (3, 128)), (9, (4, 128))],
)
def test_gptq_has_the_usual_size_nearest_to_the_bits(bits: float, size: tuple[int, int]) -> None:
    found = gptq_beside("a", bits)
    assert (found.bits, found.group_size) == size


@pytest.mark.parametrize("kind", get_args(Kind))
def test_a_baseline_is_the_teacher_quantized_and_leaves_the_teacher_alone(kind: Kind, tmp_path: Path) -> None:
    teacher = str(save_tiny(tmp_path / "teacher", "llama"))
    before = {name: value.clone() for name, value in load_teacher(teacher).model.state_dict().items()}
    blocks: list[tuple[int, int]] = []
    loaded = load_any(Baseline(kind, teacher, 2, 16).name, lambda done, count: blocks.append((done, count)))
    assert blocks == [(1, 2), (2, 2)]
    own = load_teacher(teacher)
    assert all(torch.equal(value, before[name]) for name, value in own.model.state_dict().items())
    options = {"clip": True, "act_order": True} if kind == "gptq" else {}
    method = METHODS["gptq" if kind == "gptq" else "rtn"]
    text = load_corpus("embedded", own.tokenizer, seq_len=own.model.config.max_position_embeddings, tokens=8_192)
    size = quantize_blocks(own.model, text.sequences, method, Settings(16, 2, **options))
    assert loaded.bpw == size.bpw
    ids = torch.randint(0, 200, (2, 20))
    with torch.no_grad():
        assert torch.equal(loaded.model(ids).logits, own.model(ids).logits)


def test_a_baseline_of_nothing_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LbllmError, match="none"):
        load_any(Baseline("gptq", str(tmp_path / "none"), 2, 16).name)
