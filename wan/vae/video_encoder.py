"""Encoding of a stream's input video, which can be asked for the same block twice."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from ...memory.way_back import FREE_WAY_BACK, WayBack
from .kept_features import KeptFeatures
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
        before: the cache's features before the block that is being encoded, as long as there is a way back to it.
    """

    cache: EncoderCache
    pictures: torch.Tensor | None = None
    latents: torch.Tensor | None = None
    is_whole: bool = True
    before: weakref.ref[KeptFeatures] | None = field(default=None, repr=False, compare=False)

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
        # The same pictures are not encoded again, so what was kept would only take memory while the block is made.
        kept = None if self.before is None else self.before()
        if kept is not None:
            kept.let_go()
        return latents

    def to_snapshot(self) -> dict[str, Any]:
        """The cache; the block encoded last is not asked for again."""
        return {"cache": self.cache}

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> VideoEncoder:
        """The same encoder; its cache comes on `device`."""
        return cls(parts["cache"])

    def remember(self, way: WayBack = FREE_WAY_BACK) -> Callable[[], bool]:
        """The returned function goes back to before a block that was not encoded whole, or says that it cannot."""
        kept = KeptFeatures(self.cache.features, way)
        held, latent_frames, is_whole = self.cache.held, self.cache.latent_frames, self.is_whole
        self.before = weakref.ref(kept)

        def rewind() -> bool:
            if is_whole and not self.is_whole:
                self.is_whole = kept.restore(self.cache.features)
                self.cache.held, self.cache.latent_frames = held, latent_frames
            return self.is_whole

        return rewind


def to_pixels(vae: AutoencoderKLWan, pictures: torch.Tensor) -> torch.Tensor:
    """uint8 [F, height, width, 3] as [1, 3, F, height, width] in -1..1, float32 on the VAE's device."""
    # Moved as bytes: a quarter of what has to go over the bus.
    moved = pictures.to(vae_device(vae)).permute(3, 0, 1, 2)[None]
    return moved.float().div_(127.5).sub_(1.0)
