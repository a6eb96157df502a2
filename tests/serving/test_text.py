"""Stop sequences: where an answer ends, whatever pieces it comes in, and which tokens belong to it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from lbllm.chat.stream import Chance
from lbllm.serving.text import StoppedText


def expected(text: str, stops: list[str]) -> str:
    """The text before the sequence that is complete first; of two at once, the longer one."""
    for end in range(1, len(text) + 1):
        begins = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if begins:
            return text[: min(begins)]
    return text


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
)
def test_an_answer_ends_before_its_first_stop_sequence(pieces: list[str], stops: list[str]) -> None:
    whole = expected("".join(pieces), stops)
    text = StoppedText(stops)
    told = ""
    chances: list[Chance] = []
    for number, piece in enumerate(pieces):
        part = text.add(piece, (Chance(number, 0.0),))
        told += part.text
        chances += part.chances
        assert whole.startswith(told)
        if text.stopped:
            break
    if not text.stopped:
        part = text.end()
        told += part.text
        chances += part.chances
    assert told == whole
    assert text.stopped == (whole != "".join(pieces))
    # A token belongs to the answer if it begins in it.
    begins = [len("".join(pieces[:number])) for number in range(len(pieces))]
    assert [one.token for one in chances] == [number for number, begin in enumerate(begins) if begin < len(whole)]


def test_nothing_is_held_back_that_can_t_be_a_stop_sequence() -> None:
    text = StoppedText(["\n\n", "END"])
    assert [text.add(piece).text for piece in ("one", "\n", "two E", "N", "d")] == ["one", "", "\ntwo ", "", "ENd"]
