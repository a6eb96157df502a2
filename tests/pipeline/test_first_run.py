"""The shortest preset on the embedded model: what somebody who tries the program first gets to see."""

from __future__ import annotations

from pathlib import Path

import pytest

from lbllm.config import make_config
from lbllm.events import BlockDone, Evaluated
from lbllm.pipeline.run import run


@pytest.mark.soak
def test_the_preset_preview_ends_better_than_its_first_stage_and_without_a_warning(tmp_path: Path) -> None:
    events = list(run(make_config("preview"), tmp_path, request=lambda: None))
    done = [event for event in events if isinstance(event, BlockDone)]
    assert [event.block for event in done if event.diverged] == []
    trained = [event for event in done if event.stage != "ptq"]
    assert trained
    assert all(event.loss_after < event.loss_before for event in trained)
    perplexities = {event.what: event.perplexity for event in events if isinstance(event, Evaluated)}
    *_, last = perplexities.values()
    assert last < perplexities["ptq"]
