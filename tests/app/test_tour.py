"""The tour is shown until it is dismissed, and can be called back."""

from streamlit.testing.v1 import AppTest


def _page() -> None:
    from app import tour

    tour.show()
    tour.offer()


def test_shown_dismissed_and_called_back() -> None:
    app = AppTest.from_function(_page, default_timeout=30).run()
    assert any("W(1+1)" in text.value and "A4" in text.value for text in app.markdown)
    app.button(key="tour dismissed").click().run()
    assert not app.markdown
    app.run()
    assert not app.markdown
    app.button(key="tour wanted").click().run()
    assert any("Begin here" in text.value for text in app.markdown)
