"""The saved page: whole, escaped, self-contained, for both themes."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from lbllm.chat.conversation import Exchange
from lbllm.chat.duel import Answer, Duel
from lbllm.chat.lens import Candidate, Lens, LensToken
from lbllm.chat.page import comparison_page
from lbllm.chat.settings import ChatSettings
from tests.helpers.pages import HOSTILE, Reader

TAGS = {"html", "head", "meta", "title", "style", "body", "h1", "h2", "h3", "p", "section", "div", "span", "b", "i"}
TAGS |= {"mark", "code", "details", "summary"}


class Finished(Duel):
    """A duel that was over before it began: its answers are given."""

    def __init__(self, left: Answer, right: Answer) -> None:
        self.answers = [left, right]


def exchange(prompt: str, left: str, right: str, names: tuple[str, str] = ("teacher", "student")) -> Exchange:
    answer = Answer("done", left, 12, 20.5, 0.14, weight_bytes=538_060_032, bpw=32.0)
    other = replace(answer, text=right, tokens_per_second=9.0, weight_bytes=96_600_000, bpw=3.0)
    settings = ChatSettings(system="Be kind <b>")
    return Exchange(prompt, names, (settings, settings), Finished(answer, other))


def looked_at(prompt: str, left: str, right: str, lens: Lens, names: tuple[str, str]) -> Exchange:
    one = exchange(prompt, left, right, names)
    one.lens = lens, names
    return one


def some_lens(text: str) -> Lens:
    expected = (Candidate(text, 0.6), Candidate("\n", 0.3))
    token = LensToken(text, 2.5, expected, expected[::-1], 0.6, 0.1)
    return Lens((LensToken("The", None, (), (), 0, 0), token), 0)


def test_everything_of_a_comparison_is_on_the_page() -> None:
    names = ("teacher", "student")
    one = looked_at("Why?", "The sky is blue", "The sky is grey", some_lens(" blue"), names)
    two = looked_at("And?", "Yes", "Yes", some_lens(" Yes"), names)
    page = Reader(comparison_page([one, two], votes={one.id: "right"}))
    for text in ("Why?", "The sky is ", "blue", "grey", "20.5", "9.0", "0.14 s", "538.1 MB", "96.6 MB", "3.00"):
        assert text in page.text
    for text in (
        "The right answer is better",
        "temperature 0.2",
        "repetition penalty 1.1",
        "Be kind <b>",
        "␣blue",
        "␣Yes",
        "60.0 %",
        "KL 2.500 nats",
    ):
        assert text in page.text
    assert "mark" in page.tags
    assert page.inside == []


def test_nothing_of_it_is_taken_for_html() -> None:
    names = (HOSTILE, HOSTILE)
    page = comparison_page([looked_at(HOSTILE * 20, HOSTILE, HOSTILE + " more", some_lens(HOSTILE), names)])
    read = Reader(page)
    assert read.tags <= TAGS
    assert not any(name.startswith("on") for name in read.attributes)
    assert read.attributes.isdisjoint({"src", "href"})
    assert HOSTILE in read.text


@given(st.text(max_size=40), st.text(max_size=40))
def test_any_text_comes_through(left: str, right: str) -> None:
    # Surrogates can't be saved, and a parser reads all line ends as one.
    left, right = (text.encode("utf-8", "replace").decode().replace("\r", "") for text in (left, right))
    left, right = left.replace("\0", ""), right.replace("\0", "")
    read = Reader(comparison_page([exchange("p", left, right)]))
    assert read.tags <= TAGS
    assert left in read.text
    assert right in read.text


def test_the_page_loads_nothing_and_suits_both_themes() -> None:
    page = comparison_page([looked_at("Why?", "a", "b", some_lens("x"), ("a", "b"))])
    assert "default-src 'none'" in page
    assert "prefers-color-scheme: dark" in page
    assert "color-scheme: light dark" in page
    assert "http://" not in page
    assert "https://" not in page
    assert "url(" not in page


def test_a_side_that_failed_says_why() -> None:
    failed = exchange("Why?", "", "text")
    failed.duel.answers[0] = Answer("failed", error="the model failed <here>")
    assert "the model failed <here>" in Reader(comparison_page([failed])).text


def test_an_answer_that_the_limit_cut_off_says_so() -> None:
    one = exchange("Why?", "The sky is", "The sky is blue.")
    one.duel.answers[0] = replace(one.duel.answers[0], cut=12)
    assert Reader(comparison_page([one])).text.count("Cut off here: the longest answer was 12 tokens.") == 1
    # What the user stopped is no cut.
    one.duel.answers[0] = replace(one.duel.answers[0], state="stopped")
    assert "Cut off" not in comparison_page([one])


def test_long_prompts_fold_and_texts_have_their_own_direction() -> None:
    short, long = exchange("שלום", "مرحبا", "Hello"), exchange("word " * 500, "a", "b")
    lines = exchange("line\n" * 12, "a", "b")
    assert "<details" not in comparison_page([short])
    assert 'dir="auto">שלום' in comparison_page([short])
    assert comparison_page([short]).count('class="words" dir="auto"') == 2
    for one in (long, lines):
        page = comparison_page([one])
        assert page.count("<details") == 1
        assert one.prompt.strip() in Reader(page).text
