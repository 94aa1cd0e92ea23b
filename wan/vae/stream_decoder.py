"""What decodes a stream: Wan's VAE, or a decoder in its place, while the VAE encodes the pictures of the context."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers import AutoencoderKLWan

from .banded_decoder import UNBOUNDED, DecodeBounds
from .decoder_reach import decoder_reach
from .streaming_vae import DecoderCache, LatentStatistics, decode_latent_frame
from .tiny_decoder import TinyDecoder
from .tiny_stream import TinyDecoderCache, decode_tiny_frame


@dataclass(frozen=True)
class StreamDecoder:
    """The decoder of a stream.

    Attributes:
        vae: Wan's, with its latents' statistics.
        in_its_place: another decoder of the same latents: a tiny one, or a VAE whose encoder is not used; None where
            the VAE decodes.
    """

    vae: AutoencoderKLWan
    in_its_place: AutoencoderKLWan | TinyDecoder | None = None

    @classmethod
    def of(cls, components: Any) -> StreamDecoder:  # noqa: ANN401
        """Of a pipeline's components `vae` and, where it has one, `decoder`."""
        return cls(components.vae, getattr(components, "decoder", None))

    @property
    def reach(self) -> int:
        """How many latent frames, decoded again, leave the cache that all frames before would have left."""
        if isinstance(self.in_its_place, TinyDecoder):
            return self.in_its_place.config.reach
        return decoder_reach((self.in_its_place or self.vae).decoder)

    def begin(self) -> DecoderCache:
        """An empty cache for the start of a stream; its statistics are the VAE's."""
        if isinstance(self.in_its_place, TinyDecoder):
            return TinyDecoderCache.for_decoder(self.vae, self.in_its_place)
        if self.in_its_place is None:
            return DecoderCache.for_vae(self.vae)
        return replace(DecoderCache.for_vae(self.in_its_place), statistics=LatentStatistics.of(self.vae))

    def decode(self, latent: torch.Tensor, cache: DecoderCache, bounds: DecodeBounds = UNBOUNDED) -> torch.Tensor:
        """The next latent frame's pictures: see `decode_latent_frame` and `decode_tiny_frame`."""
        if isinstance(self.in_its_place, TinyDecoder):
            assert isinstance(cache, TinyDecoderCache)
            return decode_tiny_frame(self.in_its_place, latent, cache, bounds)
        return decode_latent_frame(self.in_its_place or self.vae, latent, cache, bounds)

    def decode_again(self, latents: torch.Tensor, bounds: DecodeBounds = UNBOUNDED) -> DecoderCache:
        """The cache behind `latents`, whose pictures are dropped; the same bits as decoding them left.

        Args:
            latents: [1, channels, frames, height, width], as decoded: all of the stream, or the last `reach`.
            bounds: of the stream's decoder.
        """
        cache = self.begin()
        for latent in latents.to(cache.statistics.mean.device).split(1, dim=2):
            self.decode(latent, cache, bounds)
        return cache
