"""Encoding of a stream's input video, which can be asked for the same block twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from .streaming_vae import EncoderCache, encode_pixel_frames, vae_device


@dataclass
class VideoEncoder:
    """The encoder's cache of a video, and the block encoded last.

    A block that runs out of memory is made again with the same pictures; the cache has moved on then.

    Attributes:
        cache: of the video.
        pictures: of the block encoded last; None before the first.
        latents: of that block.
        is_whole: False while a block is being encoded, and after that has failed.
    """

    cache: EncoderCache
    pictures: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    is_whole: bool = True

    @classmethod
    def for_vae(cls, vae: AutoencoderKLWan) -> VideoEncoder:
        """At the start of a video."""
        return cls(EncoderCache.for_vae(vae))

    @classmethod
    def behind(cls, vae: AutoencoderKLWan, pictures: Iterable[torch.Tensor]) -> VideoEncoder:
        """For a video that follows these pictures of a stream, each [1, 3, height, width] in -1..1."""
        encoder, shown = cls.for_vae(vae), list(pictures)
        if shown:
            encode_pixel_frames(vae, torch.stack(shown, dim=2), encoder.cache)
        return encoder

    def encode(self, vae: AutoencoderKLWan, pictures: torch.Tensor) -> torch.Tensor:
        """Encode the next pictures, uint8 [F, height, width, 3]; the same tensor again gives the same latents.

        Returns:
            See `encode_pixel_frames`.
        """
        if pictures is self.pictures and self.latents is not None:
            return self.latents
        self.is_whole = False
        latents = encode_pixel_frames(vae, to_pixels(vae, pictures), self.cache)
        self.pictures, self.latents, self.is_whole = pictures, latents, True
        return latents

    def to_snapshot(self) -> dict[str, Any]:
        """The cache; the block encoded last is not asked for again."""
        return {"cache": self.cache}

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> VideoEncoder:
        """The same encoder; its cache comes on `device`."""
        return cls(parts["cache"])

    def remember(self) -> Callable[[], bool]:
        """The returned function says whether the block can be made again."""
        return lambda: self.is_whole


def to_pixels(vae: AutoencoderKLWan, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [F, height, width, 3] as [1, 3, F, height, width] in -1..1, float32 on the VAE's device."""
    # Moved as bytes: a quarter of what has to go over the bus.
    moved = pictures.to(vae_device(vae)).permute(3, 0, 1, 2)[None]
    return moved.float().div_(127.5).sub_(1.0)
