"""The errors that a user can see. Their message names the value, the place and the solution, without a traceback."""

from __future__ import annotations


class LbllmError(Exception):
    """Base class of all errors that are shown to a user as a plain message."""


class ConfigError(LbllmError):
    """A setting has a value that can't work."""


class ModelError(LbllmError):
    """A model is unknown, can't be loaded, or has parts that can't be binarized."""


class CorpusError(LbllmError):
    """A text is unknown, can't be read, or is too short."""


class CheckpointError(LbllmError):
    """A checkpoint is corrupt, comes from another program, or has another version."""


class ResourceError(LbllmError):
    """There is not enough memory or disk space, or another resource is missing."""


class RunError(LbllmError):
    """A run is unknown, or its state doesn't allow the operation."""


class HubError(LbllmError):
    """The Hugging Face hub can't be reached, or refuses the request."""
