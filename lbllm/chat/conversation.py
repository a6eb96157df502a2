"""A conversation with two models: prompts, both models' answers, and the messages that each model gets."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from lbllm.chat.duel import Answer, Duel, Side
from lbllm.chat.lens import Lens
from lbllm.chat.pool import Slot
from lbllm.chat.settings import ChatSettings
from lbllm.chat.stream import Messages


@dataclass(eq=False)
class Exchange:
    """One prompt and its two answers, by the models ``names`` with ``settings``.

    ``begun``: the beginning that both answers were given; ``before``: the exchange that this one went on from, with its
    own answers. ``lens``: the last lens over one of the answers, with the names of teacher and student. ``time``:
    seconds since the epoch.
    """

    prompt: str
    names: tuple[str, str]
    settings: tuple[ChatSettings, ChatSettings]
    duel: Duel
    lens: tuple[Lens, tuple[str, str]] | None = None
    begun: str = ""
    before: Exchange | None = None
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    time: float = field(default_factory=time.time)

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """The present state of both answers."""
        left, right = self.duel.answers
        return left, right


@dataclass
class Conversation:
    """The exchanges in order; the models may still be answering the last one."""

    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether a model is still answering."""
        return bool(self.exchanges) and not self.exchanges[-1].duel.over

    def messages(self, exchange: Exchange, side: int) -> Messages:
        """Return the messages for the answer of an exchange on a side (0: left, 1: right).

        They are the system prompt, the same model's earlier exchanges on this side, and the prompt.
        """
        earlier = self.exchanges[: self.exchanges.index(exchange)]
        return _messages(earlier, side, exchange.prompt, exchange.names[side], exchange.settings[side])

    def ask(
        self,
        prompt: str,
        slots: tuple[Slot, Slot],
        names: tuple[str, str],
        settings: tuple[ChatSettings, ChatSettings],
        *,
        timed: bool = False,
        begun: str = "",
    ) -> Exchange:
        """Start both models' answers to a prompt, both from the beginning ``begun``; return the exchange at once."""
        left, right = (
            Side(
                slots[side],
                _messages(self.exchanges, side, prompt, names[side], settings[side]),
                settings[side],
                begun,
            )
            for side in (0, 1)
        )
        exchange = Exchange(prompt, names, settings, Duel((left, right), timed=timed), begun=begun)
        self.exchanges.append(exchange)
        return exchange

    def go_on(self, begun: str, slots: tuple[Slot, Slot], *, timed: bool = False) -> Exchange:
        """Let both models answer the last prompt again, with the same settings, from the beginning ``begun``.

        The new exchange takes the place of the last one, and ``back`` brings that one back.
        """
        before = self.exchanges.pop()
        before.duel.stop()
        exchange = self.ask(before.prompt, slots, before.names, before.settings, timed=timed, begun=begun)
        exchange.before = before
        return exchange

    def back(self) -> None:
        """Bring back the exchange that the last one went on from; without one, nothing happens."""
        last = self.exchanges[-1]
        if last.before is not None:
            last.duel.stop()
            self.exchanges[-1] = last.before

    def drop_last(self) -> str:
        """Stop and remove the last exchange; return its prompt."""
        last = self.exchanges.pop()
        last.duel.stop()
        return last.prompt

    def clear(self) -> None:
        """Stop and remove all exchanges."""
        for exchange in self.exchanges:
            exchange.duel.stop()
        self.exchanges.clear()


def _messages(exchanges: list[Exchange], side: int, prompt: str, name: str, settings: ChatSettings) -> Messages:
    messages = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    for exchange in exchanges:
        # Skip exchanges that another model answered, or that have no answer.
        if exchange.names[side] == name and (text := exchange.answers[side].text):
            messages.append({"role": "user", "content": exchange.prompt})
            messages.append({"role": "assistant", "content": text})
    return [*messages, {"role": "user", "content": prompt}]
