"""Decode a stream of latents with `AutoencoderKLWan`, block after block, with the result of decoding them all at once.

Wan's VAE is causal in time: each convolution looks back two frames. diffusers keeps those frames in lists on
the model and clears them on every `decode`; here the list belongs to the stream and is passed to the decoder,
so nothing is patched and several streams can share one VAE.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, unpatchify

from .picture_encoder import encode_first_frame


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
    """

    statistics: LatentStatistics
    features: list[torch.Tensor | str | None] = field(default_factory=list)
    latent_frames: int = 0

    @classmethod
    def for_vae(cls, vae: AutoencoderKLWan) -> DecoderCache:
        """An empty cache for the start of a stream."""
        convolutions = [module for module in vae.decoder.modules() if isinstance(module, WanCausalConv3d)]
        remembering = sum(convolution.kernel_size[0] > 1 for convolution in convolutions)
        return cls(LatentStatistics.of(vae), features=[None] * remembering)


@torch.no_grad()
def decode_latent_frame(vae: AutoencoderKLWan, latent: torch.Tensor, cache: DecoderCache) -> torch.Tensor:
    """Decode the next latent frame of a stream; `cache` moves on by one frame.

    Args:
        vae: Wan's VAE.
        latent: [batch, z_dim, 1, height, width], as the transformer works on it (zero mean, unit variance).
        cache: of the stream.

    Returns:
        Pixels in -1..1, the VAE's dtype, [batch, 3, F, 8 * height, 8 * width]; F is 1 for the first latent
        frame of a stream and 4 for every other.
    """
    z = vae.post_quant_conv(denormalize_latents(vae, latent, cache.statistics))
    first = cache.latent_frames == 0
    pixels = vae.decoder(z, feat_cache=cache.features, feat_idx=[0], first_chunk=first)
    cache.latent_frames += 1
    if vae.config.patch_size is not None:
        pixels = unpatchify(pixels, patch_size=vae.config.patch_size)
    return pixels.clamp_(-1.0, 1.0)


@torch.no_grad()
def encode_pixel_frame(
    vae: AutoencoderKLWan, frame: torch.Tensor, statistics: LatentStatistics | None = None
) -> torch.Tensor:
    """Encode one picture as the first latent frame of a video.

    Args:
        vae: Wan's VAE.
        frame: [batch, 3, 1, height, width] in -1..1.
        statistics: of the VAE's latents; None reads them from its config.

    Returns:
        Float32 latents as the transformer works on them [batch, z_dim, 1, height / 8, width / 8]; the mode of
        the distribution, so that a stream is reproducible.
    """
    pixels = frame.to(vae_device(vae), vae_dtype(vae))
    if pixels.shape[0] == 1 and not vae.config.is_residual:
        latent = encode_first_frame(vae, pixels).chunk(2, dim=1)[0]
    else:
        latent = vae.encode(pixels).latent_dist.mode()
    known = (statistics or LatentStatistics.of(vae)).to(latent.device)
    return (latent.float() - known.mean) / known.std


def denormalize_latents(
    vae: AutoencoderKLWan, latents: torch.Tensor, statistics: LatentStatistics | None = None
) -> torch.Tensor:
    """From the transformer's latents to the VAE's: x * std + mean, in the VAE's dtype and on its device.

    Args:
        vae: Wan's VAE.
        latents: [batch, z_dim, latent frames, height, width].
        statistics: of the VAE's latents; None reads them from its config.
    """
    device = vae_device(vae)
    known = (statistics or LatentStatistics.of(vae)).to(device)
    return (latents.to(device, torch.float32) * known.std + known.mean).to(vae_dtype(vae))


def vae_dtype(vae: AutoencoderKLWan) -> torch.dtype:
    """The dtype the VAE computes in."""
    return vae.post_quant_conv.weight.dtype


def vae_device(vae: AutoencoderKLWan) -> torch.device:
    """The device the VAE's weights are on."""
    return vae.post_quant_conv.weight.device
