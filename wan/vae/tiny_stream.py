"""A stream decoded with a tiny decoder: what it keeps of the past, and its next latent frame."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers import AutoencoderKLWan

from .banded_decoder import UNBOUNDED, DecodeBounds
from .kept_features import keep_in_ram
from .residual_blocks import Features
from .streaming_vae import DecoderCache, LatentStatistics, apply_statistics
from .tiny_decoder import TinyDecoder

_META = torch.device("meta")


@dataclass
class TinyDecoderCache(DecoderCache):
    """What a tiny decoder keeps; `features` are the newest frames that its blocks read, [batch, width, height, width].

    No feature is overwritten: each is replaced. `statistics` are the VAE's, which encodes pictures of the context.
    """

    @classmethod
    def for_decoder(cls, vae: AutoencoderKLWan, decoder: TinyDecoder) -> TinyDecoderCache:
        """Of a stream before its first latent frame."""
        features: Features = [None] * decoder.memory_blocks
        return cls(LatentStatistics.of(vae), features=features)


@torch.no_grad()
def decode_tiny_frame(
    decoder: TinyDecoder, latent: torch.Tensor, cache: TinyDecoderCache, bounds: DecodeBounds = UNBOUNDED
) -> torch.Tensor:
    """Decode the next latent frame of a stream; `cache` moves on by one frame.

    Frame by frame, each is computed by the same kernels in every stream, so a stream that goes on is the same bits.

    Args:
        decoder: on its device.
        latent: [batch, latent channels, 1, height, width], as the transformer works on it (zero mean, unit variance).
        cache: of the stream.
        bounds: only `cache_in_ram` counts; the decoder works on whole pictures.

    Returns:
        Pixels in -1..1, the decoder's dtype, [batch, 3, F, S * height, S * width]; F is 1 for the first latent frame
        of a stream and `pictures_per_latent` for every other; S is its `spatial_scale`.
    """
    first = next(decoder.parameters())
    values = latent.to(first.device, torch.float32)
    if not decoder.config.takes_normalized:
        values = apply_statistics(values, cache.statistics)
    cache.begun += 1
    cache.bring_to(first.device)
    past = [feature if isinstance(feature, torch.Tensor) else None for feature in cache.features]
    pictures = decoder(values.to(first.dtype), past)
    cache.features[:] = [_kept_in_ram(feature) for feature in past] if bounds.cache_in_ram else past
    cache.latent_frames += 1
    pixels: torch.Tensor = pictures.mul_(2.0).sub_(1.0).clamp_(-1.0, 1.0)
    return pixels


def _kept_in_ram(feature: torch.Tensor | None) -> torch.Tensor | str | None:
    """See `keep_in_ram`; nothing is counted of it in a rehearsal."""
    if feature is not None and feature.device == _META:
        return torch.empty((1,) * feature.ndim, dtype=feature.dtype, device=_META).expand(feature.shape)
    return keep_in_ram(feature)
