"""How an answer is made: the settings of one side of a comparison."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

# As the makers of SmolLM2 advise; at higher ones small models, and binarized ones above all, lose the thread.
TEMPERATURE, TOP_P = 0.2, 0.9
# Small models, binarized ones above all, else fall into loops.
REPETITION_PENALTY = 1.1


class ChatSettings(BaseModel):
    """``template`` off: a chat model, too, goes on with the plain text. ``temperature`` 0 is greedy decoding.
    ``repetition_penalty`` makes tokens that the answer has already less likely (CTRL, Keskar et al. 2019); 1: none."""

    # What earlier versions could set besides is in the votes that they stored.
    model_config = ConfigDict(frozen=True, extra="ignore")

    system: str = ""
    template: bool = True
    temperature: float = Field(TEMPERATURE, ge=0, le=2)
    top_p: float = Field(TOP_P, gt=0, le=1)
    repetition_penalty: float = Field(REPETITION_PENALTY, ge=1, le=2)
    seed: int = Field(0, ge=0)
    max_new_tokens: int = Field(160, ge=1, le=4096)

    def apart_from(self, other: ChatSettings) -> str:
        """The settings in which this differs from another, in words: "temperature 0.2, top-p 1"."""
        mine, theirs = self.model_dump(), other.model_dump()
        return ", ".join(f"{_WORDS[name]} {_short(mine[name])}" for name in mine if mine[name] != theirs[name])


_WORDS = {
    "system": "system prompt",
    "template": "chat template",
    "temperature": "temperature",
    "top_p": "top-p",
    "repetition_penalty": "repetition penalty",
    "seed": "seed",
    "max_new_tokens": "longest answer",
}


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"“{value if len(value) <= 24 else value[:23] + '…'}”"
    return f"{value:g}"
