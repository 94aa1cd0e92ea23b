"""Prepare a VAE for the GPU: cuDNN's memory format, and the pack's kernels where they run."""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from torch import nn

from ...ops.kernels.norm_silu_launch import NORM_SILU
from .residual_blocks import takes_fused_passes
from .steady_decoder import fuse_decoder
from .streaming_vae import encode_pixel_frame, vae_device
from .tiny_decoder import TinyDecoder

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def speed_up_vae(vae: AutoencoderKLWan) -> None:
    """Convert a VAE on CUDA to cuDNN's layout and, where the kernel `NORM_SILU` runs, decode with fused norms.

    diffusers' own encoder and decoder stay for a VAE that the fused passes are not for.
    """
    device = vae_device(vae)
    if device.type != "cuda":
        return
    _put_channels_last(vae)
    if not takes_fused_passes(vae.config):
        return
    # Compiles the kernel's variants for the encoder now, rather than in the third block of a running stream.
    encode_pixel_frame(vae, torch.zeros((1, 3, 1, 64, 64)))
    if NORM_SILU.why_not(device) is None:
        fuse_decoder(vae)


def speed_up_decoder(decoder: AutoencoderKLWan | TinyDecoder) -> None:
    """The same of what decodes in the VAE's place."""
    if not isinstance(decoder, TinyDecoder):
        speed_up_vae(decoder)
    elif next(decoder.parameters()).device.type == "cuda":
        _put_channels_last(decoder)


def _put_channels_last(module: nn.Module) -> None:
    """Convert convolution weights to channels-last, cuDNN's layout; this saves a transposition per call."""
    for parameter in module.parameters():
        if parameter.ndim in _CHANNELS_LAST:
            parameter.data = parameter.data.contiguous(memory_format=_CHANNELS_LAST[parameter.ndim])
