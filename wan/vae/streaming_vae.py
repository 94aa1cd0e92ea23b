"""Decode and encode a stream with `AutoencoderKLWan`, block after block, with the result of doing it all at once.

Wan's VAE is causal in time: each convolution looks back two frames. diffusers keeps those frames in lists on
the model and clears them on every `decode` and `encode`; here the lists belong to the stream and are passed to decoder
and encoder, so nothing is patched and several streams can share one VAE.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import patchify, unpatchify
from torch import nn

from ...memory.way_back import FREE_WAY_BACK, WayBack
from ...ops.call_graphs import CallGraphs
from .banded_decoder import UNBOUNDED, DecodeBounds, decode_within
from .decoder_stages import count_features
from .kept_features import KeptFeatures
from .picture_encoder import encode_first_frame
from .residual_blocks import Features, takes_fused_passes


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation of a VAE's latents, float32 [1, z_dim, 1, 1, 1].

    They are on the device from the start of a stream: built from the config's lists, they would need a copy that the
    host waits for at each latent frame.
    """

    mean: torch.Tensor
    std: torch.Tensor

    @classmethod
    def of(cls, vae: AutoencoderKLWan) -> LatentStatistics:
        """From the VAE's config, on its device."""
        mean, std = (
            torch.tensor(values, device=vae_device(vae), dtype=torch.float32).view(1, -1, 1, 1, 1)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        return cls(mean, std)

    def to(self, device: torch.device) -> LatentStatistics:
        """The same on `device`; no copy if they are there already."""
        return LatentStatistics(self.mean.to(device), self.std.to(device))


@dataclass
class DecoderCache:
    """What the decoder's causal convolutions keep of the past frames.

    Attributes:
        statistics: of the VAE's latents.
        features: one entry per convolution over several frames: None, a tensor
            [batch, channels, <=2, height, width], or diffusers' mark "Rep" for a temporal upsampler that has seen one
            frame.
        latent_frames: how many latent frames were decoded.
        begun: how many were begun; more than `latent_frames` after a decoder that failed on the way.
        before: the features before the block that is being decoded, as long as there is a way back to it.
    """

    statistics: LatentStatistics
    features: Features = field(default_factory=list)
    latent_frames: int = 0
    begun: int = 0
    before: weakref.ref[KeptFeatures] | None = field(default=None, repr=False, compare=False)

    def remember(self, way: WayBack = FREE_WAY_BACK) -> Callable[[], bool]:
        """Note the cache; the returned function makes it that again, or says that it cannot.

        What is kept of it is let go of along with that function.
        """
        kept, begun, latent_frames = KeptFeatures(self.features, way), self.begun, self.latent_frames
        self.before = weakref.ref(kept)

        def rewind() -> bool:
            if self.begun != begun:
                if not kept.restore(self.features):
                    return False
                self.begun, self.latent_frames = begun, latent_frames
            return True

        return rewind

    def is_held(self, feature: object) -> bool:
        """Whether a feature must not be overwritten, because there is a way back to it."""
        kept = None if self.before is None else self.before()
        return kept is not None and kept.is_held(feature)

    def bring_to(self, device: torch.device) -> None:
        """Move what lies in RAM to `device`."""
        for index, feature in enumerate(self.features):
            if isinstance(feature, torch.Tensor):
                self.features[index] = feature.to(device)

    def to_snapshot(self) -> dict[str, Any]:
        """All of it but the way back."""
        told = vars(self) | {"statistics": vars(self.statistics)}
        del told["before"]
        return told

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> DecoderCache:
        """The same cache on `device`."""
        return cls(**_restored(parts, device))

    @classmethod
    def for_vae(cls, vae: AutoencoderKLWan) -> DecoderCache:
        """An empty cache for the start of a stream."""
        return cls(LatentStatistics.of(vae), features=_empty_features(vae.decoder))


@dataclass
class EncoderCache:
    """What the encoder's causal convolutions keep of the past, and pictures that are no whole latent frame yet.

    Attributes:
        statistics: of the VAE's latents.
        features: one entry per convolution over several frames: None, or a tensor
            [batch, channels, <=2, height, width].
        held: pictures that wait for others, [batch, 3, frames, height, width]; None where there are none.
        latent_frames: how many latent frames were encoded.
    """

    statistics: LatentStatistics
    features: Features = field(default_factory=list)
    held: torch.Tensor | None = None
    latent_frames: int = 0

    def to_snapshot(self) -> dict[str, Any]:
        """All of it."""
        return vars(self) | {"statistics": vars(self.statistics)}

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> EncoderCache:
        """The same cache on `device`, the held pictures too."""
        return cls(**_restored(parts, device))

    @classmethod
    def for_vae(cls, vae: AutoencoderKLWan) -> EncoderCache:
        """An empty cache for the start of a stream."""
        return cls(LatentStatistics.of(vae), features=_empty_features(vae.encoder))


def _restored(parts: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Attributes of a cache from its parts, their tensors copied to `device`."""

    def copied(part: Any) -> Any:  # noqa: ANN401
        return part.to(device, copy=True) if isinstance(part, torch.Tensor) else part

    attributes = {name: copied(part) for name, part in parts.items()}
    attributes["statistics"] = LatentStatistics(**{name: copied(part) for name, part in parts["statistics"].items()})
    attributes["features"] = [copied(feature) for feature in parts["features"]]
    return attributes


def _empty_features(coder: nn.Module) -> Features:
    return [None] * count_features(coder)


@torch.no_grad()
def decode_latent_frame(
    vae: AutoencoderKLWan, latent: torch.Tensor, cache: DecoderCache, bounds: DecodeBounds = UNBOUNDED
) -> torch.Tensor:
    """Decode the next latent frame of a stream; `cache` moves on by one frame.

    Args:
        vae: Wan's VAE.
        latent: [batch, z_dim, 1, height, width], as the transformer works on it (zero mean, unit variance).
        cache: of the stream.
        bounds: how the decoder saves memory; may change from frame to frame.

    Returns:
        Pixels in -1..1, the VAE's dtype, [batch, 3, F, S * height, S * width]; F is 1 for the first latent
        frame of a stream and 4 for every other; S is 8 for Wan 2.1's VAE and 16 for 2.2's.
    """
    z = vae.post_quant_conv(denormalize_latents(vae, latent, cache.statistics))
    first = cache.latent_frames == 0
    cache.begun += 1
    if bounds == UNBOUNDED:
        cache.bring_to(z.device)
        pixels = vae.decoder(z, feat_cache=cache.features, feat_idx=[0], first_chunk=first)
    else:
        pixels = decode_within(vae, z, cache.features, bounds, first=first, is_held=cache.is_held)
    cache.latent_frames += 1
    if vae.config.patch_size is not None:
        pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
    return pixels.clamp_(-1.0, 1.0)


@torch.no_grad()
def encode_pixel_frame(
    vae: AutoencoderKLWan,
    frame: torch.Tensor,
    statistics: LatentStatistics | None = None,
    graphs: CallGraphs | None = None,
) -> torch.Tensor:
    """Encode one picture as the first latent frame of a video.

    Args:
        vae: Wan's VAE.
        frame: [batch, 3, 1, height, width] in -1..1.
        statistics: of the VAE's latents; None reads them from its config.
        graphs: repeat the encoder's kernels, of which there are more than a host launches in their time.

    Returns:
        Float32 latents as the transformer works on them [batch, z_dim, 1, height / S, width / S], S as
        `decode_latent_frame` says; the mode of the distribution, so that a stream is reproducible.
    """
    pixels = frame.to(vae_device(vae), vae_dtype(vae))
    if pixels.shape[0] == 1 and takes_fused_passes(vae.config):
        latent = _encode_alone(vae, pixels, graphs).chunk(2, dim=1)[0]
    else:
        latent = vae.encode(pixels).latent_dist.mode()
    return _normalize_latents(latent, statistics or LatentStatistics.of(vae))


def _encode_alone(vae: AutoencoderKLWan, pixels: torch.Tensor, graphs: CallGraphs | None) -> torch.Tensor:
    if graphs is None or vae.encoder.conv_in._forward_pre_hooks:
        return encode_first_frame(vae, pixels)
    # One weight of each end, which tells whether the encoder has moved.
    weights = vae.encoder.conv_in.weight, vae.encoder.conv_out.weight, vae.quant_conv.weight
    key = "encode", pixels.shape, pixels.dtype
    return graphs.call(key, weights, (pixels,), lambda held: encode_first_frame(vae, held))


@torch.no_grad()
def encode_pixel_frames(vae: AutoencoderKLWan, frames: torch.Tensor, cache: EncoderCache) -> torch.Tensor:
    """Encode the next pictures of a video; `cache` moves on.

    The first latent frame is made from one picture and every other from the next 4, so pictures that are no whole
    latent frame are held back until the others come.

    Args:
        vae: Wan's VAE.
        frames: [batch, 3, any number, height, width] in -1..1, on any device.
        cache: of the video.

    Returns:
        Float32 latents as the transformer works on them [batch, z_dim, latent frames, height / S, width / S], S as
        `decode_latent_frame` says, perhaps no latent frame; the mode of the distribution.
    """
    waiting = frames if cache.held is None else torch.cat([cache.held.to(frames), frames], dim=2)
    batch, _, _, height, width = frames.shape
    scale = vae.config.scale_factor_spatial
    nothing = torch.empty((batch, vae.config.z_dim, 0, height // scale, width // scale), device=vae_device(vae))
    latents = [nothing]
    while waiting.shape[2] >= (needed := vae.config.scale_factor_temporal if cache.latent_frames else 1):
        latents.append(_encode_next(vae, waiting[:, :, :needed], cache))
        waiting = waiting[:, :, needed:]
    # Cloned: a view would keep all pictures of this call.
    cache.held = waiting.clone() if waiting.shape[2] else None
    return torch.cat(latents, dim=2)


def _encode_next(vae: AutoencoderKLWan, pictures: torch.Tensor, cache: EncoderCache) -> torch.Tensor:
    """The latent frame of as many pictures as one is made from."""
    pixels = pictures.to(vae_device(vae), vae_dtype(vae))
    if vae.config.patch_size is not None:
        pixels = patchify(pixels, patch_size=vae.config.patch_size)
    encoded = vae.quant_conv(vae.encoder(pixels, feat_cache=cache.features, feat_idx=[0]))
    cache.latent_frames += 1
    return _normalize_latents(encoded.chunk(2, dim=1)[0], cache.statistics)


def _normalize_latents(latents: torch.Tensor, statistics: LatentStatistics) -> torch.Tensor:
    """The inverse of `denormalize_latents`, in float32."""
    known = statistics.to(latents.device)
    return (latents.float() - known.mean) / known.std


def denormalize_latents(
    vae: AutoencoderKLWan, latents: torch.Tensor, statistics: LatentStatistics | None = None
) -> torch.Tensor:
    """From the transformer's latents to the VAE's: x * std + mean, in the VAE's dtype and on its device.

    Args:
        vae: Wan's VAE.
        latents: [batch, z_dim, latent frames, height, width].
        statistics: of the VAE's latents; None reads them from its config.
    """
    values = latents.to(vae_device(vae), torch.float32)
    return apply_statistics(values, statistics or LatentStatistics.of(vae)).to(vae_dtype(vae))


def apply_statistics(latents: torch.Tensor, statistics: LatentStatistics) -> torch.Tensor:
    """x * std + mean, on the latents' device."""
    known = statistics.to(latents.device)
    return latents * known.std + known.mean


def vae_dtype(vae: AutoencoderKLWan) -> torch.dtype:
    """The dtype the VAE computes in."""
    return vae.post_quant_conv.weight.dtype


def vae_device(vae: AutoencoderKLWan) -> torch.device:
    """The device the VAE's weights are on."""
    return vae.post_quant_conv.weight.device
