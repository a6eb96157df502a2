"""A binarized model beside its teacher for an audience: many visitors, one line, two answers to one question at a time.

    showcase = open_showcase()                              the checkpoint included with the project
    me = Visitor("session 7", "a long random text that only this visitor has")
    turn = showcase.ask(me, "10.0.0.3", "Why is the sky blue?", blind=True)
    showcase.seen(turn)                                     what the visitor may see now; from any thread
    showcase.vote(me, "left")

Questions are answered in the order of arrival, in threads of their own, so no page has to wait for them. ``leave``
withdraws the question of a visitor who goes away. In a blind turn the sides are swapped at random, and nothing that
identifies the models is shown before the vote.
"""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

from lbllm.chat.duel import Answer, Duel, Side
from lbllm.chat.lens import Candidate, next_tokens
from lbllm.chat.pool import ModelPool, Slot
from lbllm.chat.rate_limit import RateLimit
from lbllm.chat.settings import ChatSettings
from lbllm.chat.votes import CHOICES, Choice, Tally, Vote, VoteStore, tally
from lbllm.checkpoints.find import find_checkpoint, find_teacher, teacher_of
from lbllm.checkpoints.record import provenance
from lbllm.config import SHIPPED
from lbllm.errors import LbllmError
from lbllm.json_input import replaced
from lbllm.models.catalogue import model_title
from lbllm.places import home
from lbllm.runs.store import RunStore

_REMEMBERED = 1000
_CHARS_A_TOKEN = 8  # more than a token has on average in any language
SECRET_CHARS = (16, 200)
TurnState = Literal["waiting", "answering", "over"]


class VisitorError(LbllmError):
    """A visitor's request is not possible now; the message is shown to the visitor."""


@dataclass(frozen=True)
class Visitor:
    """Somebody who asks. ``session``: what Gradio calls a loaded page or a client; others may learn it.

    ``secret``: a random text that only this visitor has. Who has none can ask, and stop their own question, but not
    vote: anybody who knows the session could vote in their name.
    """

    session: str
    secret: str = ""

    def __post_init__(self) -> None:
        if self.secret and not SECRET_CHARS[0] <= len(self.secret) <= SECRET_CHARS[1]:
            raise VisitorError(
                f"The secret has {len(self.secret):,} characters; it needs {SECRET_CHARS[0]} to {SECRET_CHARS[1]}, "
                "chosen at random."
            )

    @property
    def key(self) -> tuple[str, str]:
        """What tells this visitor from others."""
        return ("secret", self.secret) if self.secret else ("session", self.session)


@dataclass(frozen=True)
class Limits:
    """Limits for one visitor. ``line``: the largest number of waiting questions of all visitors together.

    Visitors are told apart by their browser session, which a reload renews; ``address_per_minute`` applies to all
    visitors from one address, perhaps a whole hall.
    """

    prompt_chars: int = 600
    answer_tokens: int = 128
    per_minute: int = 6
    address_per_minute: int = 60
    line: int = 40


@dataclass(eq=False)
class Turn:
    """One question and its answers. ``number``: in the order of arrival. ``swapped``: the first model is on the
    right. ``session``: the asking visitor's."""

    number: int
    session: str
    prompt: str
    blind: bool
    swapped: bool
    settings: ChatSettings
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    duel: Duel | None = None
    withdrawn: bool = False
    choice: Choice | None = None

    @property
    def over(self) -> bool:
        """Whether the answers are complete."""
        return self.withdrawn or (self.duel is not None and self.duel.over)

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """The left and the right answer, as far as they are written."""
        if self.duel is None:
            empty = Answer(state="stopped" if self.withdrawn else "waiting")
            return empty, empty
        left, right = self.duel.answers
        return left, right


@dataclass(frozen=True)
class Seen:
    """A turn as its visitor may see it. ``position`` in the line: 1 is next, 0 is not in it; ``settings``: of both
    answers. Until a blind turn is revealed, ``names`` is None and ``answers`` lack everything that identifies the
    models."""

    state: TurnState
    number: int
    position: int
    blind: bool
    names: tuple[str, str] | None
    answers: tuple[Answer, Answer]
    votable: bool
    choice: Choice | None
    settings: ChatSettings


class Showcase:
    """Two models, the line before them, and the votes on them. Threads may share it.

    ``slots`` and ``names``: the teacher's, then the binarized model's. ``store`` keeps the votes.
    """

    def __init__(
        self, slots: tuple[Slot, Slot], names: tuple[str, str], store: RunStore, limits: Limits | None = None
    ) -> None:
        self.slots = slots
        self.names = names
        self.limits = limits or Limits()
        self._votes = VoteStore(store.database)
        self._line: deque[Turn] = deque()
        self._turns: dict[tuple[str, str], Turn] = {}
        self._mutex = threading.RLock()
        self._reading = threading.Lock()
        self._serving = False
        self._count = 0
        self._visitor_rate = RateLimit(self.limits.per_minute, 60)
        self._address_rate = RateLimit(self.limits.address_per_minute, 60)

    @property
    def ready(self) -> bool:
        """Whether both models are loaded."""
        return all(slot.state == "ready" for slot in self.slots)

    @property
    def completes(self) -> bool:
        """Whether a model has no chat template and therefore continues the text. Known once both are loaded."""
        return self.ready and not all(slot.loaded.is_chat for slot in self.slots)

    def wait(self) -> None:
        """Wait until both models are loaded. Raises LbllmError if one can't be loaded."""
        for slot in self.slots:
            slot.wait()
            slot.loaded  # noqa: B018 - raises

    def ask(self, visitor: Visitor, address: str, prompt: str, *, blind: bool = False, seed: int | None = None) -> Turn:
        """Put a question in the line. The same ``seed`` gives the same answers again; without one it is random.

        Raises VisitorError if the question is empty or too long, the visitor asks too often or has one in the line,
        or the line is full.
        """
        prompt = self._checked(prompt)
        with self._mutex:
            last = self._turns.get(visitor.key)
            if last is not None and not last.over:
                raise VisitorError("Your last question is not answered yet. Wait for it, or stop it.")
            if len(self._line) >= self.limits.line:
                raise VisitorError(f"The line is full: {len(self._line)} questions wait. Try again in a minute.")
            self._check_rate(visitor, address)
            settings = ChatSettings(
                seed=secrets.randbelow(2**31) if seed is None else seed, max_new_tokens=self.limits.answer_tokens
            )
            self._count += 1
            turn = Turn(self._count, visitor.session, prompt, blind, blind and secrets.randbelow(2) == 1, settings)
            self._remember(visitor, turn)
            self._line.append(turn)
            if not self._serving:
                self._serving = True
                threading.Thread(target=self._serve, name="lbllm-showcase", daemon=True).start()
        return turn

    def next(
        self, visitor: Visitor, address: str, prompt: str, begun: str = ""
    ) -> tuple[tuple[Candidate, ...], tuple[Candidate, ...]]:
        """What the teacher and the binarized model find likeliest next in their answer to a question, of which
        ``begun`` is written already. It counts as a question, and one is computed at a time.

        Raises VisitorError as ``ask``, for a beginning that is too long, and while the models are being loaded.
        """
        prompt = self._checked(prompt)
        begun = replaced(begun)
        most = _CHARS_A_TOKEN * self.limits.answer_tokens
        if len(begun) > most:
            raise VisitorError(f"The beginning has {len(begun):,} characters; {most:,} are allowed. Shorten it.")
        if not self.ready:
            raise VisitorError("The models are being loaded. Try again in a minute.")
        with self._mutex:
            self._check_rate(visitor, address)
        messages = [{"role": "user", "content": prompt}]
        with self._reading:
            first, second = (
                next_tokens(slot.loaded.model, slot.loaded.tokenizer, messages, begun=begun) for slot in self.slots
            )
        return first, second

    def _checked(self, prompt: str) -> str:
        # JSON can contain a lone surrogate, which a tokenizer does not accept.
        prompt = replaced(prompt).strip()
        if not prompt:
            raise VisitorError("The question is empty. Write one, or choose an example.")
        if len(prompt) > self.limits.prompt_chars:
            raise VisitorError(
                f"The question has {len(prompt):,} characters; {self.limits.prompt_chars:,} are allowed. Shorten it."
            )
        return prompt

    def seen(self, turn: Turn) -> Seen:
        """The turn as it is now."""
        with self._mutex:
            position = self._line.index(turn) + 1 if turn in self._line else 0
            over, answers = turn.over, turn.answers
            votable = turn.blind and over and turn.choice is None and _comparable(answers)
            hidden = turn.blind and turn.choice is None and (votable or not over)
            return Seen(
                state="over" if over else "waiting" if turn.duel is None else "answering",
                number=turn.number,
                position=position,
                blind=turn.blind,
                names=None if hidden else self._names(turn),
                answers=_hidden(answers) if hidden else answers,
                votable=votable,
                choice=turn.choice,
                settings=turn.settings,
            )

    def stop(self, turn: Turn) -> None:
        """End the answers after the current token, or take the question out of the line."""
        with self._mutex:
            if turn.duel is not None:
                turn.duel.stop()
            elif not turn.withdrawn:
                turn.withdrawn = True
                self._line.remove(turn)

    def current(self, visitor: Visitor) -> Turn | None:
        """The visitor's last turn."""
        with self._mutex:
            return self._turns.get(visitor.key)

    def leave(self, session: str) -> None:
        """Stop the questions of a session that are not answered yet. What was answered can still be voted on."""
        with self._mutex:
            for turn in [turn for turn in self._turns.values() if turn.session == session and not turn.over]:
                self.stop(turn)

    def vote(self, visitor: Visitor, choice: str) -> Turn:
        """Keep the visitor's vote on the last, blind, turn, which reveals it. It needs the visitor's secret. Raises
        VisitorError, ResourceError."""
        if choice not in CHOICES:
            raise VisitorError(f"{str(choice)[:40]!r} is not a vote. Give one of: {', '.join(CHOICES)}.")
        if not visitor.secret:
            raise VisitorError("A vote needs the secret that the question was asked with. Ask with a secret to vote.")
        with self._mutex:
            turn = self._turns.get(visitor.key)
            if turn is None or not turn.blind:
                raise VisitorError("There is nothing to vote on. Ask a question in blind mode first.")
            if turn.choice is not None:
                raise VisitorError("You have voted on these answers. Ask another question to vote again.")
            if not turn.over:
                raise VisitorError("The answers are not finished. Vote when they are, or stop them.")
            if not self.seen(turn).votable:
                raise VisitorError("There are no two answers to compare. Ask again.")
            left, right = self._names(turn)
            self._votes.put(
                Vote(
                    exchange=turn.id,
                    time=time.time(),
                    left=left,
                    right=right,
                    choice=choice,
                    prompt=turn.prompt,
                    left_answer=turn.answers[0].text,
                    right_answer=turn.answers[1].text,
                    left_settings=turn.settings,
                    right_settings=turn.settings,
                )
            )
            turn.choice = choice
            return turn

    def tally(self) -> Tally:
        """All blind votes on this pair; left is the teacher."""
        return tally(self._votes.all(), *self.names)

    def _names(self, turn: Turn) -> tuple[str, str]:
        first, second = self.names
        return (second, first) if turn.swapped else (first, second)

    def _check_rate(self, visitor: Visitor, address: str) -> None:
        wait = max(self._visitor_rate.wait(visitor.key), self._address_rate.wait(address))
        if wait:
            raise VisitorError(f"That was many questions in a minute. The next one is possible in {math.ceil(wait)} s.")
        self._visitor_rate.take(visitor.key)
        self._address_rate.take(address)

    def _remember(self, visitor: Visitor, turn: Turn) -> None:
        self._turns.pop(visitor.key, None)
        self._turns[visitor.key] = turn
        if len(self._turns) > _REMEMBERED:
            # Not every visitor calls ``leave``. Those with a question in the line are among the newest.
            del self._turns[next(iter(self._turns))]

    def _serve(self) -> None:
        while True:
            with self._mutex:
                if not self._line:
                    self._serving = False
                    return
                turn = self._line.popleft()
                messages = [{"role": "user", "content": turn.prompt}]
                first, second = (Side(slot, messages, turn.settings) for slot in self.slots)
                turn.duel = duel = Duel((second, first) if turn.swapped else (first, second))
            duel.wait()


def open_showcase(checkpoint: str = SHIPPED, teacher: str | None = None, *, limits: Limits | None = None) -> Showcase:
    """The showcase of a packed checkpoint, given by any of its names, and its teacher (default: the model it was made
    from); starts to load both. Votes are kept in home()/showcase.

    Raises CheckpointError, ModelError, RunError.
    """
    found = find_checkpoint(checkpoint, running=True)
    made_from = provenance(found.stated).get("model")
    teacher = teacher or teacher_of(found)
    find_teacher(teacher)
    student = f"{model_title(made_from or found.name)} binarized"
    pool = ModelPool()
    slots = pool.get(teacher), pool.get(found.name)
    return Showcase(slots, (model_title(teacher), student), RunStore(home() / "showcase"), limits)


def _comparable(answers: tuple[Answer, Answer]) -> bool:
    return all(answer.text.strip() and answer.state != "failed" for answer in answers)


def _hidden(answers: tuple[Answer, Answer]) -> tuple[Answer, Answer]:
    """The answers without what identifies the models: their figures, and which model is faster."""
    left, right = answers
    return _keeping_pace(left, right), _keeping_pace(right, left)


def _keeping_pace(answer: Answer, other: Answer) -> Answer:
    length = len(answer.text) if other.over else min(len(answer.text), len(other.text))
    ended = answer.over and length == len(answer.text)
    return Answer(
        state=answer.state if ended else "writing",
        text=answer.text[:length],
        error=answer.error,
        cut=answer.cut if ended else 0,
    )
