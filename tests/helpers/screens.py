"""The screens that pages are tried on, and what axe-core finds on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, TypeVar

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, BrowserContext, Page

Test = TypeVar("Test", bound=Callable[..., Any])


class Screen(NamedTuple):
    """Width and height in CSS pixels; "light" or "dark". Up to 640 pixels of width it is touched, not clicked."""

    width: int
    height: int
    theme: str = "light"

    def context(self, browser: Browser) -> BrowserContext:
        """A fresh profile on this screen."""
        touch = self.width <= 640
        return browser.new_context(
            viewport={"width": self.width, "height": self.height},
            color_scheme="dark" if self.theme == "dark" else "light",
            has_touch=touch,
            is_mobile=touch,
        )


PHONE, LAPTOP, PROJECTOR = (390, 844), (1280, 720), (1920, 1080)
SCREENS = [Screen(*size, theme) for size in (PHONE, LAPTOP, PROJECTOR) for theme in ("light", "dark")]


def screens(*risky: Screen) -> Callable[[Test], Test]:
    """Give a test each of ``SCREENS``, and ``risky`` ones, as ``screen``: in `make test` the risky ones alone."""
    others = [screen for screen in SCREENS if screen not in risky]
    cells = [*risky, *(pytest.param(screen, marks=pytest.mark.soak) for screen in others)]
    return pytest.mark.parametrize("screen", cells, ids=lambda screen: "{}x{}-{}".format(*screen))


class Known(NamedTuple):
    """A finding that is not in our markup or styles: the rule of axe-core, and a part of the element's HTML."""

    rule: str
    html: str


def serious(page: Page, known: Iterable[Known] = ()) -> list[str]:
    """What axe-core calls serious or critical on the page as it stands: "rule: element", without the ``known``."""
    found = Axe().run(page, options={"resultTypes": ["violations"]}).response["violations"]
    return [
        f"{violation['id']}: {node['html'][:300]} ({node['any'][0]['message'] if node['any'] else violation['help']})"
        for violation in found
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
        if not any(violation["id"] == rule and html in node["html"] for rule, html in known)
    ]
