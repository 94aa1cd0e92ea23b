"""StreamBlocks: block-autoregressive video diffusion as an endless stream, for ComfyUI."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from comfy_api.latest import ComfyExtension

WEB_DIRECTORY = "./web"


async def comfy_entrypoint() -> ComfyExtension:
    """ComfyUI's entry: the pack's nodes."""
    # Imported here, so that `streamblocks.wan` and the rest also import where there is no ComfyUI.
    from .nodes.extension import StreamBlocksExtension

    return StreamBlocksExtension()
