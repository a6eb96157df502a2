"""What all parts of a run's settings have in common: they are frozen, and every value is checked when it is set."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, field_validator

LARGEST_INTEGER = 10**12  # of any setting
MOST_PATTERNS = 1_000  # of a setting


class Section(BaseModel):
    # JSON has no infinity: settings with one could be written, but not read again.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _within_reason(cls, value: object) -> object:
        if isinstance(value, int) and abs(value) > LARGEST_INTEGER:
            raise ValueError(f"no run can use more than {LARGEST_INTEGER:,}")
        if isinstance(value, list | tuple | dict) and len(value) > MOST_PATTERNS:
            # Before each of them is checked, which takes time; and every layer would be compared with each of them.
            raise ValueError(f"{len(value):,} entries; at most {MOST_PATTERNS:,} are allowed")
        return value
