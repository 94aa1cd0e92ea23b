"""What a node shows while it runs: progress, previews, lines of text, links."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import comfy.utils
import torch
from PIL import Image
from server import PromptServer

from .execution import throw_if_cancelled
from .messages import message_text

_PREVIEW_SIZE = 512


class StreamProgress:
    """Progress over the denoising steps of a stream on one node, and what the node says.

    An earlier run's last line goes from the node.

    Args:
        total_steps: to count to.
        hidden: the node's hidden inputs, of which `unique_id` and `extra_pnginfo` are read; None outside of a prompt.
        on_say: told of each line that is said, as its id and values.
    """

    def __init__(
        self,
        total_steps: int,
        hidden: Any,  # noqa: ANN401
        on_say: Callable[[str, Mapping[str, Any]], None] | None = None,
    ) -> None:
        self._on_say = on_say
        self._node_id = None if hidden is None else hidden.unique_id
        self._workflow_id = workflow_id(None if hidden is None else hidden.extra_pnginfo)
        self.expect(total_steps)
        self._send_message(None, {}, "")

    def expect(self, total_steps: int) -> None:
        """Count from 0 to `total_steps` from now on."""
        self._bar = comfy.utils.ProgressBar(total_steps, node_id=self._node_id)

    def update(self, steps_done: int) -> None:
        """Show `steps_done` of the total; raises when the user pressed cancel."""
        throw_if_cancelled()
        self._bar.update_absolute(steps_done)

    def show_picture(self, steps_done: int, picture: torch.Tensor, *, someone_watches: bool = True) -> None:
        """Show progress, and to those who have no player the newest picture as the node's preview.

        Args:
            steps_done: of the total.
            picture: uint8 [height, width, 3] on the CPU.
            someone_watches: whether a page plays the stream; ComfyUI's preview would show one still below it.
        """
        preview = None if someone_watches else ("JPEG", Image.fromarray(picture.numpy()), _PREVIEW_SIZE)
        self._bar.update_absolute(steps_done, preview=preview)

    def say(self, message: str, **values: str | float) -> str:
        """Say a line on the node, in the page that started the prompt, if there is one.

        Args:
            message: its id, see `message_text`.
            values: of its template.

        Returns:
            The line in English.
        """
        text = message_text(message, values)
        self._send_message(message, values, text)
        if self._on_say is not None:
            self._on_say(message, values)
        return text

    def show_unfinished(self, video: dict[str, Any]) -> None:
        """Send the link to an unfinished video (filename, subfolder, type, pictures) to that page."""
        self._send("streamblocks.unfinished", video)

    def _send_message(self, message: str | None, values: dict[str, Any], text: str) -> None:
        self._send("streamblocks.says", {"id": message, "values": values, "text": text})

    def _send(self, event: str, message: dict[str, Any]) -> None:
        server = PromptServer.instance
        if self._node_id is not None and server.client_id is not None:
            # Without the client's id, it would go to every open page.
            place = {"node": self._node_id, "workflow": self._workflow_id}
            server.send_sync(event, {**place, **message}, server.client_id)


def workflow_id(extra: Any) -> str | None:  # noqa: ANN401
    """The page's own id of a prompt's workflow, from the hidden input `extra_pnginfo`; None where there is none.

    Node ids repeat from one workflow to the next.
    """
    workflow = extra.get("workflow") if isinstance(extra, dict) else None
    return workflow.get("id") if isinstance(workflow, dict) else None
