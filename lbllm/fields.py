"""What a pydantic Field allows, as widgets and documents need it: choices, bounds, and both in words."""

from __future__ import annotations

from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic.fields import FieldInfo


def choices(field: FieldInfo) -> tuple[Any, ...]:
    """The values of a Literal in the order of their definition; empty for any other type."""
    return get_args(field.annotation) if get_origin(field.annotation) is Literal else ()


def bounds(field: FieldInfo) -> tuple[float | None, float | None]:
    """The least and the greatest number allowed, None where there is no bound. A float that must be above or below a
    bound has the bound itself here, since there is no number next to it."""
    next_to = 1 if field.annotation is int else 0
    least: Any = None
    greatest: Any = None
    for rule in field.metadata:
        if isinstance(rule, Ge):
            least = rule.ge
        elif isinstance(rule, Gt):
            least = rule.gt + next_to  # type: ignore[operator]
        elif isinstance(rule, Le):
            greatest = rule.le
        elif isinstance(rule, Lt):
            greatest = rule.lt - next_to  # type: ignore[operator]
    return least, greatest


def allowed(field: FieldInfo) -> str:
    """The values allowed, in words: "4, 8 or 16", "at least 0, below 1"; empty where any will do."""
    values = [str(value) for value in choices(field)]
    if values:
        return " or ".join(filter(None, [", ".join(values[:-1]), values[-1]]))
    words = {Ge: "at least", Gt: "above", Le: "at most", Lt: "below"}
    rules = [rule for rule in field.metadata if type(rule) in words]
    return ", ".join(f"{words[type(rule)]} {getattr(rule, type(rule).__name__.lower()):,}" for rule in rules)
