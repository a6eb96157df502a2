"""LoRA of PEFT on a packed model, as docs/extend.md shows it."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

import lbllm
from tests.helpers import ROOT
from tests.helpers.tiny_runs import run_config, run_tiny, tiny_teacher, token_ids

peft = pytest.importorskip("peft", reason="PEFT is not in the lock")


def test_lora_trains_beside_packed_bits(tmp_path: Path) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    run_tiny(run_config(), tmp_path, tiny_teacher("llama"))
    base: Any = lbllm.load(tmp_path / "checkpoint")[0]
    ids = token_ids(2, seed=1)
    before = base(ids).logits.detach()
    model = names["with_lora"](base)
    assert torch.equal(model(ids).logits, before)
    optimizer = torch.optim.Adam([part for part in model.parameters() if part.requires_grad], 1e-2)
    losses = []
    for _ in range(10):
        loss = model(ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    after = model(ids).logits.detach()
    model.save_pretrained(tmp_path / "adapter")
    fresh = lbllm.load(tmp_path / "checkpoint")[0]
    again = peft.PeftModel.from_pretrained(fresh, tmp_path / "adapter", config=names["lora_config"]())
    torch.testing.assert_close(again(ids).logits, after)
    with pytest.raises(NotImplementedError, match="packed bits"):
        model.merge_and_unload()
    assert torch.equal(model.unload()(ids).logits, before)
