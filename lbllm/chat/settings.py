"""How an answer is made: the settings of one side of a comparison. Label, help and bounds stand in each Field."""

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

    system: str = Field(
        "",
        title="System prompt",
        description="What the model is told before the conversation. Base models are not given one.",
    )
    template: bool = Field(
        True,
        title="Chat template",
        description="Off: the model continues your text instead of answering it.",
    )
    temperature: float = Field(
        TEMPERATURE,
        ge=0,
        le=2,
        title="Temperature",
        description="How much chance there is in an answer. 0: always the most likely token.",
    )
    top_p: float = Field(
        TOP_P,
        gt=0,
        le=1,
        title="Top-p",
        description="Draw from the most likely tokens that together have this probability.",
    )
    repetition_penalty: float = Field(
        REPETITION_PENALTY,
        ge=1,
        le=2,
        title="Repetition penalty",
        description="Makes tokens that the answer already has less likely, so that it does not repeat itself. 1: off.",
    )
    seed: int = Field(0, ge=0, title="Seed", description="The same seed gives the same answer again.")
    max_new_tokens: int = Field(
        160,
        ge=1,
        le=4096,
        title="Longest answer",
        description="The most tokens that an answer can have; a token is about three quarters of a word.",
    )

    def apart_from(self, other: ChatSettings) -> str:
        """The settings in which this differs from another, in words: "temperature 0.2, top-p 1"."""
        mine, theirs = self.model_dump(), other.model_dump()
        titles = {name: str(field.title).lower() for name, field in type(self).model_fields.items()}
        return ", ".join(f"{titles[name]} {_short(mine[name])}" for name in mine if mine[name] != theirs[name])


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"“{value if len(value) <= 24 else value[:23] + '…'}”"
    return f"{value:g}"
