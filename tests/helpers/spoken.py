"""What the fixture ``say`` of tests/commands is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Spoken = Callable[..., Any]
