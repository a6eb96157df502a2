"""The settings of an answer: one side of a comparison. Each Field has its label, help and bounds."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field

# The values that the authors of SmolLM2 recommend; with higher ones, small and especially binarized models lose the
# thread.
TEMPERATURE, TOP_P = 0.2, 0.9
# Without a penalty, small and especially binarized models repeat themselves endlessly.
REPETITION_PENALTY = 1.1


class ChatSettings(BaseModel):
    """The settings of an answer.

    ``template`` off: a chat model continues the plain text. ``temperature`` 0 is greedy decoding.
    ``repetition_penalty`` makes tokens less likely that the answer already contains (CTRL, Keskar et al. 2019); 1: off.
    """

    # Votes stored by earlier versions contain settings that no longer exist; they are ignored.
    model_config = ConfigDict(frozen=True, extra="ignore")

    system: str = Field(
        "",
        title="System prompt",
        description="Instructions for the model before the conversation. Base models do not get them.",
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
        description="The randomness of an answer. 0: always the most likely token.",
    )
    top_p: float = Field(
        TOP_P,
        gt=0,
        le=1,
        title="Top-p",
        description="Choose only from the most likely tokens, which together have this probability.",
    )
    repetition_penalty: float = Field(
        REPETITION_PENALTY,
        ge=1,
        le=2,
        title="Repetition penalty",
        description="Makes tokens less likely that the answer already contains, to avoid repetitions. 1: off.",
    )
    seed: int = Field(0, ge=0, title="Seed", description="The same seed gives the same answer again.")
    max_new_tokens: int = Field(
        160,
        ge=1,
        le=4096,
        title="Longest answer",
        description="The maximum number of tokens in an answer; a token is about three quarters of a word.",
    )

    def apart_from(self, other: ChatSettings) -> str:
        """Return the settings that differ from ``other``, as text: "temperature 0.2, top-p 1"."""
        mine, theirs = self.model_dump(), other.model_dump()
        titles = {name: str(field.title).lower() for name, field in type(self).model_fields.items()}
        return ", ".join(f"{titles[name]} {_short(mine[name])}" for name in mine if mine[name] != theirs[name])


def _short(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, str):
        return f"“{value if len(value) <= 24 else value[:23] + '…'}”"
    return f"{value:g}"
