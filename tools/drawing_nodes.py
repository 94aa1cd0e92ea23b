"""ComfyUI's own nodes that draw an image, for a host that has none: plain colours, one on top of another."""

from __future__ import annotations

from typing import Any

import torch

_INTEGER: tuple[str, dict[str, Any]] = ("INT", {})


class EmptyImage:
    """ComfyUI's node of this name: images of one colour, 0xRRGGBB."""

    FUNCTION = "generate"
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """See ComfyUI."""
        return {"required": dict.fromkeys(("width", "height", "batch_size", "color"), _INTEGER)}

    def generate(self, width: int, height: int, batch_size: int, color: int) -> tuple[torch.Tensor]:
        """float32 [batch_size, height, width, 3], 0..1."""
        levels = torch.tensor([color >> 16 & 255, color >> 8 & 255, color & 255]) / 255
        return (levels.expand(batch_size, height, width, 3).clone(),)


class ImageCompositeMasked:
    """ComfyUI's node of this name, without its mask and its resizing: one image on another of the same batch size."""

    FUNCTION = "composite"
    CATEGORY = "image"
    RETURN_TYPES = ("IMAGE",)

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        """See ComfyUI."""
        images = dict.fromkeys(("destination", "source"), ("IMAGE",))
        return {"required": images | {"x": _INTEGER, "y": _INTEGER, "resize_source": ("BOOLEAN", {})}}

    def composite(
        self, destination: torch.Tensor, source: torch.Tensor, x: int, y: int, resize_source: bool
    ) -> tuple[torch.Tensor]:
        """The destination with the source's left top corner at (x, y), in pixels.

        Raises:
            ValueError: the source is to be resized.
        """
        if resize_source:
            raise ValueError("resize_source is on, which only ComfyUI itself can do: switch it off.")
        made = destination.clone()
        rows, columns = made.shape[1] - y, made.shape[2] - x
        made[:, y : y + source.shape[1], x : x + source.shape[2]] = source[:, :rows, :columns]
        return (made,)


DRAWING_NODES: dict[str, type] = {"EmptyImage": EmptyImage, "ImageCompositeMasked": ImageCompositeMasked}
