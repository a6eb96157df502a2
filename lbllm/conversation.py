"""A comparison: prompts, each with the answers of two models, and what the models saw of it."""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field

from lbllm.chat import Messages
from lbllm.chat_settings import ChatSettings
from lbllm.duel import Answer, Duel, Side
from lbllm.pool import Slot


@dataclass
class Exchange:
    """One prompt and its two answers, by the models ``names`` under ``settings``."""

    prompt: str
    names: tuple[str, str]
    settings: tuple[ChatSettings, ChatSettings]
    duel: Duel
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    time: float = field(default_factory=time.time)

    @property
    def answers(self) -> tuple[Answer, Answer]:
        """Both answers as far as they are written."""
        left, right = self.duel.answers
        return left, right


@dataclass
class Conversation:
    """Exchanges in order; the last one may still be being written."""

    exchanges: list[Exchange] = field(default_factory=list)

    @property
    def running(self) -> bool:
        """Whether an answer is being written."""
        return bool(self.exchanges) and not self.exchanges[-1].duel.over

    def messages(self, side: int, prompt: str, settings: ChatSettings) -> Messages:
        """The conversation of a side (0 left, 1 right) up to a new prompt: its own earlier answers, never the
        other's."""
        return _messages(self.exchanges, side, prompt, settings)

    def before(self, number: int, side: int) -> Messages:
        """What the answer of exchange ``number`` on a side was given."""
        exchange = self.exchanges[number]
        return _messages(self.exchanges[:number], side, exchange.prompt, exchange.settings[side])

    def ask(
        self,
        prompt: str,
        slots: tuple[Slot, Slot],
        names: tuple[str, str],
        settings: tuple[ChatSettings, ChatSettings],
        *,
        timed: bool = False,
    ) -> Exchange:
        """Let both models answer; returns at once."""
        left, right = (
            Side(slots[side], self.messages(side, prompt, settings[side]), settings[side]) for side in (0, 1)
        )
        exchange = Exchange(prompt, names, settings, Duel((left, right), timed=timed))
        self.exchanges.append(exchange)
        return exchange

    def drop_last(self) -> str:
        """Take the last exchange back, stopped if it runs; its prompt."""
        last = self.exchanges.pop()
        last.duel.stop()
        return last.prompt

    def clear(self) -> None:
        """Forget everything."""
        for exchange in self.exchanges:
            exchange.duel.stop()
        self.exchanges.clear()


def _messages(exchanges: list[Exchange], side: int, prompt: str, settings: ChatSettings) -> Messages:
    messages = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    for exchange in exchanges:
        # A side that failed, or was stopped before its first word, has said nothing that it could be reminded of.
        if text := exchange.answers[side].text:
            messages.append({"role": "user", "content": exchange.prompt})
            messages.append({"role": "assistant", "content": text})
    return [*messages, {"role": "user", "content": prompt}]
