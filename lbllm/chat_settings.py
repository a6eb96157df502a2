"""How an answer is made: the settings of one side of a comparison."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class ChatSettings(BaseModel):
    """``template`` off: a chat model, too, goes on with the plain text. ``temperature`` 0 is greedy decoding.

    ``expand``: packed weights are kept expanded in memory, which changes speed and memory, not the answer.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    system: str = ""
    template: bool = True
    temperature: float = Field(0.7, ge=0, le=2)
    top_p: float = Field(0.95, gt=0, le=1)
    seed: int = Field(0, ge=0)
    max_new_tokens: int = Field(160, ge=1, le=4096)
    expand: bool = True

    def differences(self, other: ChatSettings) -> dict[str, tuple[object, object]]:
        """The settings in which two differ, by name: own value, the other's value."""
        mine, theirs = self.model_dump(), other.model_dump()
        return {name: (mine[name], theirs[name]) for name in mine if mine[name] != theirs[name]}
