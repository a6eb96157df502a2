"""Read the example prompts, by kind, from assets/prompts.json."""

from __future__ import annotations

import json

from pydantic import BaseModel, ConfigDict, TypeAdapter

from lbllm.places import ASSETS


class PromptKind(BaseModel):
    """A kind of task, and its prompts."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: str
    prompts: tuple[str, ...]


def example_prompts() -> list[PromptKind]:
    """Return all example prompts, in the order in which they are shown."""
    return TypeAdapter(list[PromptKind]).validate_python(json.loads((ASSETS / "prompts.json").read_text()))
