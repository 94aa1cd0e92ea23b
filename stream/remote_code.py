"""Whether a repository's own Python code may run: never because a workflow says so alone."""

from __future__ import annotations

import os

# Set on the server by whoever runs it; a workflow cannot.
REMOTE_CODE_VARIABLE = "STREAMBLOCKS_ALLOW_REMOTE_CODE"


def check_remote_code_allowed(model: str) -> None:
    """Raise unless whoever runs this machine lets repositories run their own code.

    A workflow is a file from anywhere, so its tick 'trust_remote_code' is not consent by itself.

    Raises:
        PermissionError: the environment variable is not set to 1.
    """
    if os.environ.get(REMOTE_CODE_VARIABLE) != "1":
        raise PermissionError(
            f"trust_remote_code is ticked for {model!r}, but this server does not run code from repositories: read the "
            f"code, then start ComfyUI with the environment variable {REMOTE_CODE_VARIABLE}=1, or untick it."
        )
