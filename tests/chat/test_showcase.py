"""The showcase: its line, limits and blind votes; its endpoints through gradio_client; what its server refuses."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from gradio_client import Client
from gradio_client.exceptions import AppError

from app.showcase.page import serve
from lbllm.chat.pool import Slot
from lbllm.chat.rate_limit import RateLimit
from lbllm.chat.showcase import Limits, Showcase, Turn, Visitor, VisitorError, open_showcase
from lbllm.chat.stream import answer_ids
from lbllm.chat.votes import VoteStore
from lbllm.checkpoints.find import find_checkpoint
from lbllm.commands.main import main
from lbllm.errors import CheckpointError, LbllmError, ModelError, ResourceError
from lbllm.models.catalogue import model_title
from lbllm.runs.database import Database
from lbllm.runs.store import RunStore
from lbllm.share.export import export
from tests.helpers import waiting
from tests.helpers.ports import free_port
from tests.helpers.tiny_models import save_tiny
from tests.helpers.tiny_showcase import NAMES, endless_slots, tiny_pair

SECRET = "only this visitor has it"
QUESTION = "What is the capital of France?"
MANY = Limits(answer_tokens=12, per_minute=1000, address_per_minute=1000)
LONG = Limits(answer_tokens=4000, per_minute=1000, address_per_minute=1000)
wait_until = partial(waiting.wait_until, seconds=60.0)
Make = Callable[[Limits], Showcase]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tiny_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def slots(folders: tuple[Path, Path]) -> tuple[Slot, Slot]:
    return endless_slots(*folders)


@pytest.fixture
def make(slots: tuple[Slot, Slot], tmp_path: Path) -> Iterator[Make]:
    """Makes showcases under given limits, whose answers are ended after the test."""
    made: list[Showcase] = []

    def showcase(limits: Limits) -> Showcase:
        made.append(Showcase(slots, NAMES, RunStore(tmp_path / "store"), limits))
        return made[-1]

    yield showcase
    for one in made:
        for turn in list(one._turns.values()):
            one.stop(turn)


def who(name: str) -> Visitor:
    """A visitor with a secret of their own."""
    return Visitor(name, f"{name} alone knows this")


def finished(showcase: Showcase, turn: Turn) -> Turn:
    wait_until(lambda: showcase.seen(turn).state == "over")
    return turn


def test_a_rate_limit_counts_each_key_by_itself_and_forgets() -> None:
    now = 0.0
    limit = RateLimit(2, 60, clock=lambda: now)
    assert [limit.take("a"), limit.take("a"), limit.take("b")] == [0, 0, 0]
    now = 10.0
    assert limit.take("a") == 50
    assert limit.wait("a") == 50
    assert limit.take("b") == 0
    now = 60.0
    assert limit.wait("a") == 0
    assert [limit.take("a"), limit.take("a")] == [0, 0]
    assert limit.take("a") == 60
    for key in range(3000):
        now += 1
        limit.take(key)
    assert len(limit._taken) < 1200


@pytest.mark.parametrize(
    ("limits", "asked", "complaint"),
    [
        (MANY, "  \n ", "empty"),
        (Limits(prompt_chars=10), "x" * 11, "11 characters; 10 are allowed"),
        (Limits(line=0), QUESTION, "line is full"),
    ],
)
def test_questions_that_are_refused(make: Make, limits: Limits, asked: str, complaint: str) -> None:
    showcase = make(limits)
    with pytest.raises(VisitorError, match=complaint):
        showcase.ask(who("me"), "here", asked)
    assert showcase.current(who("me")) is None


def test_whoever_asks_too_often_waits_and_nobody_else_does(make: Make) -> None:
    showcase = make(Limits(answer_tokens=1, per_minute=2, address_per_minute=4))
    for _ in range(2):
        finished(showcase, showcase.ask(who("me"), "hall", QUESTION))
    with pytest.raises(VisitorError, match=r"possible in \d+ s"):
        showcase.ask(who("me"), "hall", QUESTION)
    for visitor in ("you", "she"):
        finished(showcase, showcase.ask(who(visitor), "hall", QUESTION))
    # A new session is no way round: the address has its limit, too.
    with pytest.raises(VisitorError, match="many questions"):
        showcase.ask(who("he"), "hall", QUESTION)
    finished(showcase, showcase.ask(who("he"), "elsewhere", QUESTION))


def test_a_prompt_that_is_no_text_ends_in_a_message(make: Make) -> None:
    showcase = make(MANY)
    turn = finished(showcase, showcase.ask(who("me"), "here", "a \ud800 b"))
    assert turn.prompt == "a ? b"
    assert [answer.state for answer in turn.answers] == ["done", "done"]


# ------------------------------------------------------------------------------------------------ the line


def test_first_come_first_served_one_at_a_time(make: Make) -> None:
    showcase = make(LONG)
    turns = [showcase.ask(who(f"visitor {number}"), "here", f"{QUESTION} {number}") for number in range(4)]
    wait_until(lambda: turns[0].duel is not None)
    assert [showcase.seen(turn).position for turn in turns] == [0, 1, 2, 3]
    assert [showcase.seen(turn).number for turn in turns] == [1, 2, 3, 4]
    assert [showcase.seen(turn).state for turn in turns] == ["answering", *["waiting"] * 3]
    with pytest.raises(VisitorError, match="not answered yet"):
        showcase.ask(who("visitor 2"), "here", "Another one?")
    # Who stops, or goes, makes room for the next.
    showcase.stop(turns[1])
    assert showcase.seen(turns[1]).state == "over"
    assert [showcase.seen(turn).position for turn in turns[2:]] == [1, 2]
    showcase.leave("visitor 2")
    assert showcase.seen(turns[3]).position == 1
    showcase.leave("visitor 0")
    finished(showcase, turns[0])
    wait_until(lambda: turns[3].duel is not None)
    assert turns[2].duel is None
    assert turns[0].answers[0].tokens < LONG.answer_tokens
    # Whoever stopped may ask again.
    assert showcase.seen(showcase.ask(who("visitor 1"), "here", QUESTION)).position == 1


def test_many_at_once_get_their_own_answers(make: Make) -> None:
    showcase = make(MANY)
    questions = [f"{number} {QUESTION}" for number in range(6)]

    def answers(number: int, visitor: str) -> list[str]:
        turn = finished(showcase, showcase.ask(who(visitor), "here", questions[number], seed=number))
        return [answer.text for answer in turn.answers]

    alone = [answers(number, "alone") for number in range(6)]
    assert len({tuple(texts) for texts in alone}) == 6
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(lambda number: answers(number, f"visitor {number}"), range(6)))
    assert together == alone


# ------------------------------------------------------------------------------------------------ blind turns


def test_a_blind_turn_tells_nothing_before_the_vote(make: Make) -> None:
    showcase = make(Limits(answer_tokens=60))
    turn = showcase.ask(who("me"), "here", QUESTION, blind=True)
    unlike = 0
    while not (seen := showcase.seen(turn)).votable:
        assert seen.names is None
        left, right = seen.answers
        assert {(one.tokens, one.tokens_per_second, one.bpw, one.weight_bytes) for one in (left, right)} == {(0,) * 4}
        if "done" not in (left.state, right.state):
            unlike = max(unlike, abs(len(left.text) - len(right.text)))
        with pytest.raises(VisitorError, match="not finished"):
            showcase.vote(who("me"), "left")
        time.sleep(0.01)
    assert unlike == 0, "the faster model shows"
    with pytest.raises(VisitorError, match="'best' is not a vote"):
        showcase.vote(who("me"), "best")
    showcase.vote(who("me"), "left")
    seen = showcase.seen(turn)
    assert seen.names == (NAMES[::-1] if turn.swapped else NAMES)
    assert seen.choice == "left"
    assert all(answer.tokens_per_second > 0 for answer in seen.answers)
    # On each side stands the answer of the model that is named there.
    sizes = {name: slot.loaded.weight_bytes for name, slot in zip(NAMES, showcase.slots, strict=True)}
    assert [answer.weight_bytes for answer in seen.answers] == [sizes[name] for name in seen.names]
    with pytest.raises(VisitorError, match="have voted"):
        showcase.vote(who("me"), "right")


def test_votes_count_for_models_whatever_side_they_were_on(make: Make, tmp_path: Path) -> None:
    showcase = make(MANY)
    sides: set[bool] = set()
    asked = 0
    while len(sides) < 2 and asked < 40:
        asked += 1
        turn = finished(showcase, showcase.ask(who("me"), "here", QUESTION, blind=True))
        showcase.vote(who("me"), "right" if turn.swapped else "left")
        sides.add(turn.swapped)
    counted = showcase.tally()
    assert (counted.left, counted.right, counted.total) == (asked, 0, asked)
    assert len(sides) == 2
    kept = VoteStore(Database(tmp_path / "store")).all()
    assert {(vote.left, vote.right) for vote in kept} == {NAMES, NAMES[::-1]}
    assert all(vote.prompt == QUESTION and vote.left_answer and vote.right_answer for vote in kept)


def test_a_vote_needs_what_only_its_visitor_has(make: Make) -> None:
    showcase = make(MANY)
    turn = finished(showcase, showcase.ask(who("me"), "here", QUESTION, blind=True))
    with pytest.raises(VisitorError, match="needs the secret"):
        showcase.vote(Visitor("me"), "left")
    with pytest.raises(VisitorError, match="nothing to vote on"):
        showcase.vote(Visitor("me", "a guess of somebody"), "left")
    assert showcase.current(Visitor("me")) is None
    # The one who closes the session, whoever that is, takes no vote away.
    showcase.leave("me")
    assert showcase.vote(who("me"), "left") is turn
    with pytest.raises(VisitorError, match="16 to 200"):
        Visitor("me", "short")


def test_what_can_not_be_voted_on(make: Make) -> None:
    showcase = make(LONG)
    with pytest.raises(VisitorError, match="nothing to vote on"):
        showcase.vote(who("me"), "left")
    turn = showcase.ask(who("me"), "here", QUESTION)
    assert showcase.seen(turn).names == NAMES
    showcase.stop(turn)
    finished(showcase, turn)
    with pytest.raises(VisitorError, match="nothing to vote on"):
        showcase.vote(who("me"), "left")
    first = showcase.ask(who("you"), "here", QUESTION)
    turn = showcase.ask(who("me"), "here", QUESTION, blind=True)
    showcase.stop(turn)
    # Nothing was written: nothing to compare, and nothing to hide.
    assert showcase.seen(turn).names is not None
    with pytest.raises(VisitorError, match="no two answers"):
        showcase.vote(who("me"), "left")
    showcase.stop(first)
    assert showcase.tally().total == 0


def test_what_is_opened(folders: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lbllm.chat.showcase.home", lambda: tmp_path)
    teacher, checkpoint = folders
    with pytest.raises(ModelError, match="--teacher"):  # a path in a checkpoint is not followed
        open_showcase(str(checkpoint))
    showcase = open_showcase(str(checkpoint), str(teacher))
    assert showcase.names == ("teacher", "teacher binarized")
    showcase.wait()
    assert showcase.ready
    assert not showcase.completes
    base = open_showcase(str(checkpoint), str(save_tiny(tmp_path / "base", "gpt2")))
    base.wait()
    assert base.completes
    assert base.names[0] == "base"
    with pytest.raises(CheckpointError, match="not a packed checkpoint"):
        open_showcase(str(teacher))
    with pytest.raises(ModelError, match="missing does not exist"):
        open_showcase(str(checkpoint), str(tmp_path / "missing"))
    with pytest.raises(ModelError, match="already quantized"):
        open_showcase(str(checkpoint), str(checkpoint))
    (tmp_path / "empty").mkdir()
    empty = open_showcase(str(checkpoint), str(tmp_path / "empty"))
    with pytest.raises(LbllmError, match=r"empty has no config\.json"):
        empty.wait()


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("smollm2-135m-instruct", "SmolLM2-135M-Instruct"),
        ("qwen3-0.6b", "Qwen3-0.6B"),
        ("somebody/their-model", "their-model"),
        ("/home/anna/mine.gguf", "mine"),
        ("C:\\anna\\mine\\", "mine"),
        (".", "."),
    ],
)
def test_a_model_is_titled_by_its_name(name: str, shown: str) -> None:
    assert model_title(name) == shown


def test_a_teacher_that_is_not_here_is_asked_for(folders: tuple[Path, Path], tmp_path: Path) -> None:
    given = export(find_checkpoint(str(folders[1])), "packed", tmp_path / "given").path
    with pytest.raises(ModelError, match=r"given was made from teacher.*--teacher"):
        open_showcase(str(given))


def test_the_command_names_what_is_wrong(
    folders: tuple[Path, Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lbllm.chat.showcase.home", lambda: tmp_path)
    assert main(["showcase", str(tmp_path)]) == 1
    assert f"{tmp_path} is not a packed checkpoint" in capsys.readouterr().err
    assert main(["showcase", "--port", "70000"]) == 2
    # What shows only while it loads ends the server.
    (tmp_path / "empty").mkdir()
    empty = ["showcase", str(folders[1]), "--teacher", str(tmp_path / "empty"), "--port", str(free_port())]
    assert main(empty) == 1
    shown = capsys.readouterr().err
    assert "LBLLM Showcase: http://127.0.0.1:" in shown
    assert str(tmp_path / "empty") in shown


# ------------------------------------------------------------------------------------------------ the server


@pytest.fixture(scope="module")
def address(slots: tuple[Slot, Slot], tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A running showcase on this machine."""
    limits = Limits(prompt_chars=200, answer_tokens=20, per_minute=3, address_per_minute=100)
    showcase = Showcase(slots, NAMES, RunStore(tmp_path_factory.mktemp("votes")), limits)
    with serve(showcase, host="127.0.0.1", port=free_port()) as url:
        yield url


def client(address: str) -> Client:
    return Client(address, verbose=False, analytics_enabled=False)


def test_ask_and_vote_through_the_client(address: str) -> None:
    visitor = client(address)
    about = visitor.predict(api_name="/about")
    assert about["names"] == list(NAMES)
    assert about["limits"]["prompt_chars"] == 200
    seen: list[dict[str, Any]] = list(visitor.submit(QUESTION, False, 3, api_name="/ask"))
    assert seen[-1]["state"] == "over"
    assert seen[-1]["names"] == list(NAMES)
    # The limit of tokens cut both answers off.
    assert [answer["cut"] for answer in seen[-1]["answers"]] == [20, 20]
    grown = [[answer["text"] for answer in one["answers"]] for one in seen]
    assert all(later[side].startswith(earlier[side]) for earlier, later in pairwise(grown) for side in (0, 1))
    again = visitor.predict(QUESTION, False, 3, api_name="/ask")
    assert [one["text"] for one in again["answers"]] == grown[-1]

    hidden = visitor.predict(QUESTION, blind=True, secret=SECRET, api_name="/ask")
    assert (hidden["names"], hidden["votable"]) == (None, True)
    # Somebody who knows the session, and not the secret, can't vote in this visitor's name.
    thief = client(address)
    thief.session_hash = visitor.session_hash
    for stolen in ("", "another secret text"):
        with pytest.raises(AppError, match=r"needs the secret|nothing to vote on"):
            thief.predict("left", stolen, api_name="/vote")
    with pytest.raises(AppError, match="16 to 200"):
        thief.predict("left", "short", api_name="/vote")
    assert thief.predict(api_name="/stop") is False
    shown = visitor.predict("tie", SECRET, api_name="/vote")
    assert sorted(shown["names"]) == sorted(NAMES)
    assert client(address).predict(api_name="/tally") == {NAMES[0]: 0, NAMES[1]: 0, "tie": 1, "both bad": 0}


def test_what_both_expect_next_through_the_client(address: str, slots: tuple[Slot, Slot]) -> None:
    found = client(address).predict(QUESTION, "The capital", api_name="/next")
    assert [one["name"] for one in found] == list(NAMES)
    for one, slot in zip(found, slots, strict=True):
        model, tokenizer = slot.loaded.model, slot.loaded.tokenizer
        ids = answer_ids(tokenizer, [{"role": "user", "content": QUESTION}], "The capital")
        with torch.no_grad():
            probabilities = model(input_ids=ids).logits[0, -1].double().softmax(-1)
        expected = probabilities.topk(len(one["tokens"]))
        assert [token["text"] for token in one["tokens"]] == [tokenizer.decode([i]) for i in expected.indices]
        assert [token["probability"] for token in one["tokens"]] == pytest.approx(expected.values.tolist(), rel=1e-3)
    with pytest.raises(AppError, match="201 characters; 200"):
        client(address).predict("x" * 201, api_name="/next")
    with pytest.raises(AppError, match="The beginning has 161 characters; 160"):
        client(address).predict(QUESTION, "x" * 161, api_name="/next")


def test_refusals_reach_the_client_as_they_are(address: str) -> None:
    visitor = client(address)
    for prompt, seed, complaint in [
        ("x" * 201, None, "201 characters; 200 are allowed"),
        ("", None, "empty"),
        (["a"], None, "must be a text"),
        (QUESTION, -1, "whole number"),
    ]:
        with pytest.raises(AppError, match=complaint):
            visitor.predict(prompt, False, seed, api_name="/ask")
    with pytest.raises(AppError, match="nothing to vote on"):
        visitor.predict("left", f"{SECRET}, too", api_name="/vote")
    assert visitor.predict(api_name="/stop") is False
    for _ in range(3):
        visitor.predict("Hi", api_name="/ask")
    with pytest.raises(AppError, match=r"next one is possible in \d+ s"):
        visitor.predict("Hi", api_name="/ask")


def test_files_and_foreign_names_are_refused(address: str) -> None:
    own = httpx.get(address)
    assert own.status_code == 200
    assert own.headers["x-frame-options"] == "DENY"
    assert own.headers["content-security-policy"] == "frame-ancestors 'none'"
    for host, status in {
        "LOCALHOST:1": 200,
        "127.0.0.1": 200,
        "example.com": 403,
        "localhost.example.com": 403,
    }.items():
        assert httpx.get(address, headers={"host": host}).status_code == status
    upload = httpx.post(f"{address}gradio_api/upload", files={"files": ("a.txt", b"x")})
    assert upload.status_code == 403
    for path in ("file=/etc/hostname", "deep_link?session_hash=x", "proxy=http://example.com", "run-history/records"):
        assert httpx.get(f"{address}gradio_api/{path}").status_code == 403
    foreign = {"origin": "http://example.com"}
    assert httpx.post(f"{address}gradio_api/call/tally", json={"data": []}, headers=foreign).status_code == 403


MALFORMED: list[tuple[str, bytes, int]] = [
    ("call/ask", b"x" * (1 << 20), 413),
    ("call/ask", b"{", 422),
    ("call/ask", b"[" * 60_000, 422),
    ("call/ask", b"\xff\xfe", 422),
    ("call/ask", b"[]", 422),
    ("call/ask", b'{"data": []}', 422),
    ("call/ask", b'{"data": "\\u001b[31mred\\nline"}', 422),
    ("call/ask", b'{"data": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, false, null, ""]}', 422),
    ("call/%1b%5b31mred%0aline", b'{"data": []}', 422),
    ("call/v2/vote", b'{"\\u001b[31mred\\nline": 1}', 500),
    ("call/v2/nothing", b"{}", 422),
    ("queue/join", b'{"data": [], "fn_index": 100000, "session_hash": "a"}', 422),
    ("queue/join", b'{"data": [], "fn_index": "x", "session_hash": "a"}', 422),
    ("queue/join", b'{"data": ["\\u001b[31mred\\nline"], "fn_index": 0, "session_hash": "a"}', 422),
    ("queue/join", b'{"data": [], "fn_index": 0, "session_hash": {"a": 1}}', 422),
    ("run/vote", b'{"data": []}', 422),
    ("cancel", b'{"session_hash": ["\\u001b[31mred"]}', 422),
    ("nothing", b"{}", 403),
]


def test_a_malformed_call_is_one_line_in_the_log(
    address: str, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    for path, body, status in MALFORMED:
        caplog.clear()
        answer = httpx.post(
            f"{address}gradio_api/{path}", content=body, headers={"content-type": "application/json"}, timeout=30
        )
        assert answer.status_code == status, (path, body[:80], answer.text)
        assert len(answer.text) < 1000
        (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("lbllm")]
        assert line.isprintable()
        assert len(line) < 500
    # What passes the checks and is wrong nevertheless is told by the endpoint.
    for choice in ("\x1b[31mred\nline", ["left"], 7, "x" * 5000):
        with pytest.raises(AppError, match="is not a vote"):
            client(address).predict(choice, SECRET, api_name="/vote")
    written = "".join(capfd.readouterr())
    assert "Traceback" not in written
    assert "\x1b" not in written


def test_an_unexpected_error_is_one_line_in_the_log(
    address: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("\x1b[31mred\nline" + "x" * 5000)

    monkeypatch.setattr(Showcase, "vote", fail)
    with pytest.raises(AppError, match="unexpected error occurred"):
        client(address).predict("left", SECRET, api_name="/vote")
    (line,) = [record.getMessage() for record in caplog.records if record.name.startswith("lbllm")]
    assert line.isprintable()
    assert "RuntimeError" in line
    assert "Traceback" not in "".join(capfd.readouterr())


def test_a_space_may_be_framed_by_the_hub(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.showcase.page.get_space", lambda: "somebody/showcase")
    with serve(make(MANY), host="127.0.0.1", port=free_port()) as url:
        headers = httpx.get(url).headers
    assert "x-frame-options" not in headers
    assert "frame-ancestors" not in headers.get("content-security-policy", "")


def test_nothing_is_fetched_from_anywhere_and_nothing_is_reported(address: str) -> None:
    config = httpx.get(f"{address}config").json()
    assert config["analytics_enabled"] is False
    assert not config.get("stylesheets")
    # The name of SVG in the icons that lie in the text itself is no address.
    css = httpx.get(f"{address}theme.css").text.replace("http://www.w3.org/2000/svg", "")
    assert "--body-text-color" in css
    assert "//" not in css


def test_a_port_that_is_taken_is_named(address: str, make: Make) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    with (
        pytest.raises(ResourceError, match=f"port {port} of 127.0.0.1 is taken"),
        serve(make(MANY), host="127.0.0.1", port=port),
    ):
        pass
