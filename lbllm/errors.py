"""The errors a user can cause or meet. Their text names the value, the place and the way out; no traceback is
needed."""

from __future__ import annotations


class LbllmError(Exception):
    """Base of all errors that are shown to a user as a plain message."""


class ConfigError(LbllmError):
    """A setting has a value that can't work."""


class ModelError(LbllmError):
    """A model is unknown, can't be loaded, or has parts that can't be binarized."""


class CorpusError(LbllmError):
    """A text is unknown, can't be read, or is too short."""


class CheckpointError(LbllmError):
    """A checkpoint is corrupt, foreign, or of another version."""


class ResourceError(LbllmError):
    """Memory or disk doesn't suffice."""


class RunError(LbllmError):
    """A run is unknown, or is in a state that doesn't allow what was asked."""


class HubError(LbllmError):
    """The Hugging Face hub can't be reached, or refuses what was asked."""
