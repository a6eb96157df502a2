"""docs/settings.md says what the fields say."""

from __future__ import annotations

from benchmarks.settings_page import PAGE, page
from lbllm.config import SETTINGS


def test_the_page_is_current() -> None:
    assert PAGE.read_text(encoding="utf-8") == page(), "run python -m benchmarks.settings_page"


def test_the_page_has_every_setting() -> None:
    text = page()
    assert [path for path in SETTINGS if f"| `{path}`" not in text] == ["schema_version"]
