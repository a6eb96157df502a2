"""Ask the Hugging Face hub about a repository before loading from it: one short request instead of many retries."""

from __future__ import annotations

from typing import Literal

import huggingface_hub
from huggingface_hub import errors

Answer = Literal["online", "cached", "unreachable", "gated", "unknown"]


def ask(repository: str, kind: Literal["model", "dataset"]) -> Answer:
    """Return how a repository (owner/name) is available now.

    ``cached``: the hub doesn't answer, but an earlier download exists. ``unknown``: the hub has no such repository.
    """
    api = huggingface_hub.HfApi()
    try:
        if kind == "model":
            api.model_info(repository, timeout=10)
        else:
            api.dataset_info(repository, timeout=10)
        return "online"
    except errors.GatedRepoError:
        return "gated"
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        return "unknown"
    except (errors.HTTPError, OSError):  # type: ignore[attr-defined]
        name = "config.json" if kind == "model" else "README.md"
        found = huggingface_hub.try_to_load_from_cache(repository, name, repo_type=kind)
        return "cached" if isinstance(found, str) else "unreachable"
