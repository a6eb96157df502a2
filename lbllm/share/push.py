"""Push an exported folder to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, errors

from lbllm.errors import ConfigError, HubError
from lbllm.models.catalogue import HUB_ID


def check_repository(repository: str) -> None:
    """Raise ConfigError unless this is a name that a repository on the hub can have."""
    if not HUB_ID.fullmatch(repository):
        raise ConfigError(f"repository {repository!r} is not of the form OWNER/NAME, e.g. me/my-model-lbllm")


def push(folder: Path, repository: str, token: str, *, space: bool = False) -> str:
    """Upload the files of ``folder`` to ``repository``, a model's or a Space's, and return its address.

    A repository that doesn't exist yet is created as a private one. The token is sent only to the hub. Raises
    HubError if the hub can't be reached or refuses; the folder stays complete in every case.
    """
    api = HfApi(token=token)
    kind = "space" if space else "model"
    again = f"{folder} is complete; push it later with `hf upload --repo-type {kind} {repository} {folder}`"
    try:
        sdk = "gradio" if space else None
        address = api.create_repo(repository, private=True, exist_ok=True, repo_type=kind, space_sdk=sdk)
        message = "Binarized with LBLLM Workbench"
        api.upload_folder(repo_id=repository, folder_path=folder, commit_message=message, repo_type=kind)
    except errors.HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status in (401, 403):
            raise HubError(
                f"the hub refuses the token for {repository} ({status}); use one of an account that may write there. "
                f"{again}"
            ) from None
        raise HubError(f"the hub refuses {repository} ({_first_line(error)}). {again}") from None
    except (errors.HFValidationError, ValueError) as error:
        raise HubError(f"{repository} can't be pushed ({_first_line(error)}). {again}") from None
    except Exception as error:  # any error of the hub's client or of the network
        raise HubError(f"the hub at {api.endpoint} can't be reached ({_first_line(error)}). {again}") from None
    return str(address)


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
