"""How many random cases a property is tried on: some in `make test`, many more in `make soak`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
from hypothesis import settings

# `make soak` sets the first; a test that repeats others under other conditions sets the second.
FACTOR = 20 if os.environ.get("LBLLM_SOAK") else 1
SHARE = 0.3 if os.environ.get("LBLLM_FEW_CASES") else 1.0
Test = TypeVar("Test", bound=Callable[..., Any])


def cases(count: int, **options: Any) -> Callable[[Test], Test]:
    """Try a hypothesis test on ``count`` cases, in `make soak` on 20 times as many; ``options`` as of ``settings``."""

    def apply(test: Test) -> Test:
        tried: Test = settings(max_examples=round(count * FACTOR * SHARE), deadline=None, **options)(test)
        marked: Test = pytest.mark.random(tried)
        return marked

    return apply
