"""Fetch a diffusers-layout repository from the Hugging Face hub; only ever because the user named it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

from ..wan.checkpoint_files import CheckpointError

BUILT_IN_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer")


def fetch_pipeline_folder(
    repository: str, revision: str | None, components: Sequence[str] = BUILT_IN_COMPONENTS
) -> Path:
    """Download (or find in the hub's cache) the named components: configs, safetensors and tokenizer files only.

    Raises:
        CheckpointError: no such repository, no network, or no permission.
    """
    patterns = ["*.json"]
    for component in components:
        patterns += [f"{component}/*.json", f"{component}/*.safetensors", f"{component}/*.model"]
    try:
        return Path(snapshot_download(repository, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"hub repository {repository!r} could not be fetched ({reason}): check its name, your network and "
            "whether it asks for a login, or download it into models/diffusers and choose the folder."
        ) from error
