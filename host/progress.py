"""What a node shows while it runs: progress, previews, lines of text, the memory chart."""

from __future__ import annotations

from typing import Any

import comfy.utils
import torch
from PIL import Image
from server import PromptServer

from .execution import throw_if_cancelled

_PREVIEW_SIZE = 512


class StreamProgress:
    """Progress over the denoising steps of a stream on one node, with the newest picture as preview."""

    def __init__(self, total_steps: int, node_id: str | None) -> None:
        self._node_id = node_id
        self.expect(total_steps)

    def expect(self, total_steps: int) -> None:
        """Count from 0 to `total_steps` from now on."""
        self._bar = comfy.utils.ProgressBar(total_steps, node_id=self._node_id)

    def update(self, steps_done: int) -> None:
        """Show `steps_done` of the total; raises when the user pressed cancel."""
        throw_if_cancelled()
        self._bar.update_absolute(steps_done)

    def show_picture(self, steps_done: int, picture: torch.Tensor) -> None:
        """Show a picture, uint8 [height, width, 3] on the CPU, as the node's preview."""
        image = Image.fromarray(picture.numpy())
        self._bar.update_absolute(steps_done, preview=("JPEG", image, _PREVIEW_SIZE))

    def say(self, text: str) -> None:
        """Show a line of text on the node, in the page that started the prompt, if there is one."""
        server = PromptServer.instance
        if self._node_id is not None and server.client_id is not None:
            # Without the client's id, it would go to every open page, onto whatever node has the same number there.
            server.send_progress_text(text, self._node_id, server.client_id)

    def show_memory(self, point: dict[str, Any]) -> None:
        """Send a point of the memory chart to the page that started the prompt, if there is one."""
        self._send("streamblocks.memory", point)

    def show_unfinished(self, video: dict[str, Any]) -> None:
        """Send the link to an unfinished video (filename, subfolder, type, pictures, workflow) to that page."""
        self._send("streamblocks.unfinished", video)

    def _send(self, event: str, message: dict[str, Any]) -> None:
        server = PromptServer.instance
        if self._node_id is not None and server.client_id is not None:
            server.send_sync(event, {"node": self._node_id, **message}, server.client_id)
