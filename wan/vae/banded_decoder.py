"""Decode a latent frame of Wan's VAE within less memory: in bands of rows, and with the cache in RAM."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d, WanDecoder3d

from .band_features import BandFeatures, IsHeld, never_held
from .decoder_stages import Band, DecoderStage, split_into_stages
from .norm_silu import PAST_FRAMES
from .residual_blocks import AnyFeatures, Features
from .steady_decoder import is_fused, is_steady, run_steady_entry, run_steady_stage


@dataclass(frozen=True)
class DecodeBounds:
    """How a decoder saves memory; the pictures are the same but for rounding.

    Attributes:
        bands: of rows that the largest pictures are computed in; fewer where a stage works on smaller ones. Where the
            decoder cannot be split, it works on whole pictures.
        cache_in_ram: whether the cache is kept in RAM, between blocks and while the decoder does not read it.
    """

    bands: int = 1
    cache_in_ram: bool = False


_StageRun = Callable[[DecoderStage, torch.Tensor, AnyFeatures], torch.Tensor]

UNBOUNDED = DecodeBounds()
# Eight would save 0.15 GB more at 832x480: halos and whole pictures between the stages remain.
BAND_COUNTS = (1, 2, 4)


def can_split(config: Mapping[str, Any]) -> bool:
    """Whether a decoder works in bands: the up blocks of Wan 2.2's VAE have shortcuts around their upsampling.

    A tiny decoder, whose config does not say, has no bands.
    """
    return not config.get("is_residual", True)


def decode_within(
    vae: AutoencoderKLWan,
    latents: torch.Tensor,
    features: Features,
    bounds: DecodeBounds,
    *,
    first: bool,
    is_held: IsHeld = never_held,
) -> torch.Tensor:
    """What `vae.decoder` makes of `latents`.

    Args:
        vae: Wan's VAE.
        latents: [batch, z_dim, 1, height, width], after `post_quant_conv`.
        features: the stream's cache; each is replaced or overwritten.
        bounds: on memory.
        first: whether this is the stream's first latent frame.
        is_held: whether a feature is kept by somebody else, and is to be replaced.
    """
    rows = latents.shape[3]
    if not can_split(vae.config):
        seen = BandFeatures(features, rows, latents.device, in_ram=bounds.cache_in_ram, is_held=is_held)
        made: torch.Tensor = vae.decoder(latents, feat_cache=seen, feat_idx=[0], first_chunk=first)
        return made
    decoder: WanDecoder3d = vae.decoder
    # As for whole pictures: from the third latent frame on.
    steady = is_fused(decoder) and latents.shape[0] == 1 and is_steady(features)
    run = run_steady_stage if steady else _run_stage
    entry = BandFeatures(features, rows, latents.device, in_ram=bounds.cache_in_ram, is_held=is_held)
    value = (run_steady_entry if steady else _run_entry)(decoder, latents, entry)
    del entry
    stages = split_into_stages(decoder)
    largest = max(stage.size for stage in stages)
    for stage in stages:
        # As many as keep its bands no larger than those of the largest stage.
        count = -(-bounds.bands * stage.size // largest)
        seen = BandFeatures(features, value.shape[3], value.device, in_ram=bounds.cache_in_ram, is_held=is_held)
        value = _run_in_bands(stage, value, seen, stage.bands(value.shape[3], count), run)
    return value


def _run_in_bands(
    stage: DecoderStage, value: torch.Tensor, seen: BandFeatures, bands: list[Band], run: _StageRun
) -> torch.Tensor:
    """The stage's whole output, made band after band."""
    rows = value.shape[3]
    whole: torch.Tensor | None = None
    for band, following in zip(bands, [*bands[1:], None], strict=True):
        seen.begin(band, following)
        made = run(stage, value[:, :, :, band.top : band.bottom], seen)
        if len(bands) == 1:
            return made
        scale = stage.scale
        if whole is None:
            whole = _empty_like(made, rows * scale)
        own = made[:, :, :, (band.start - band.top) * scale : (band.stop - band.top) * scale]
        whole[:, :, :, band.start * scale : band.stop * scale] = own
        del made, own
    assert whole is not None
    return whole


def _empty_like(band: torch.Tensor, rows: int) -> torch.Tensor:
    """As many rows, in the band's memory layout."""
    channels_last = band.is_contiguous(memory_format=torch.channels_last_3d)
    return torch.empty(
        (*band.shape[:3], rows, band.shape[4]),
        dtype=band.dtype,
        device=band.device,
        memory_format=torch.channels_last_3d if channels_last else torch.contiguous_format,
    )


def _run_entry(decoder: WanDecoder3d, latents: torch.Tensor, features: AnyFeatures) -> torch.Tensor:
    """The decoder's first convolution and its middle block, by diffusers' modules."""
    value = _convolve_next(decoder.conv_in, latents, features, 0)
    made: torch.Tensor = decoder.mid_block(value, feat_cache=features, feat_idx=[1])
    return made


def _run_stage(stage: DecoderStage, value: torch.Tensor, features: AnyFeatures) -> torch.Tensor:
    """A stage by diffusers' modules."""
    counter = [stage.first_feature]
    if stage.upsampler is not None:
        value = stage.upsampler(value, feat_cache=features, feat_idx=counter)
    for resnet in stage.resnets:
        value = resnet(value, feat_cache=features, feat_idx=counter)
    if stage.decoder is None:
        return value
    normed = stage.decoder.nonlinearity(stage.decoder.norm_out(value))
    del value
    return _convolve_next(stage.decoder.conv_out, normed, features, counter[0])


def _convolve_next(
    convolution: WanCausalConv3d, frames: torch.Tensor, features: AnyFeatures, index: int
) -> torch.Tensor:
    """The convolution of the next frames of a stream."""
    past = features[index]
    assert not isinstance(past, str)
    made: torch.Tensor = convolution(frames, past)
    newest = frames[:, :, -PAST_FRAMES:]
    if past is not None and newest.shape[2] < PAST_FRAMES:
        newest = torch.cat([past, newest], dim=2)[:, :, -PAST_FRAMES:]
    features[index] = newest.clone()
    return made
