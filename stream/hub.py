"""Fetch a diffusers-layout repository from the Hugging Face hub; only ever because the user named it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError

from ..checkpoints.checkpoint_files import CheckpointError

BUILT_IN_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")


def fetch_pipeline_folder(
    repository: str, revision: str | None, components: Sequence[str] = BUILT_IN_COMPONENTS
) -> Path:
    """Download (or find in the hub's cache) the named components: configs, safetensors and tokenizer files only.

    Raises:
        CheckpointError: no such repository, no network, or no permission.
    """
    refuse_folder_as_hub_id(repository)
    patterns = ["*.json"]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.safetensors", f"{component}/*.model"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        raise _not_fetched(repository, error) from error


def fetch_file(repository: str, revision: str | None, name: str) -> Path | None:
    """Download (or find in the hub's cache) one file; None when the repository has none of that name.

    Raises:
        CheckpointError: no such repository, no network, or no permission.
    """
    refuse_folder_as_hub_id(repository)
    try:
        return Path(hf_hub_download(repository, name, revision=revision))
    except LocalEntryNotFoundError as error:
        raise _not_fetched(repository, error) from error
    except EntryNotFoundError:
        return None
    except (HfHubHTTPError, OSError) as error:
        raise _not_fetched(repository, error) from error


def refuse_folder_as_hub_id(repository: str) -> None:
    """Raise when a folder of this name lies where the program was started: diffusers would take it for the repository.

    Raises:
        CheckpointError: there is such a folder or file.
    """
    if Path(repository).exists():
        raise CheckpointError(
            f"hub id {repository!r} is also a path below {Path.cwd()}: a path is never taken for a hub repository; "
            "put the model into models/diffusers and choose it in the loader."
        )


def _not_fetched(repository: str, error: Exception) -> CheckpointError:
    reason = str(error).splitlines()[0]
    return CheckpointError(
        f"hub repository {repository!r} could not be fetched ({reason}): check its name, your network and "
        "whether it asks for a login, or download it into models/diffusers and choose the folder."
    )
