"""Whether a repository's own Python code may run: a workflow alone cannot allow it."""

from __future__ import annotations

import os

# Set by the operator of the server; a workflow cannot set it.
REMOTE_CODE_VARIABLE = "STREAMBLOCKS_ALLOW_REMOTE_CODE"


def check_remote_code_allowed(model: str) -> None:
    """Raise unless the operator of this server allows repositories to run their own code.

    A workflow can come from anyone, so its tick 'trust_remote_code' alone is not consent.

    Raises:
        PermissionError: the environment variable is not set to 1.
    """
    if os.environ.get(REMOTE_CODE_VARIABLE) != "1":
        raise PermissionError(
            f"trust_remote_code is ticked for {model!r}, but this server does not run code from repositories: read the "
            f"code, then start ComfyUI with the environment variable {REMOTE_CODE_VARIABLE}=1, or untick it."
        )
