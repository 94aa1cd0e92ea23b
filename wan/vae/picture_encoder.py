"""The encoder of Wan 2.1's VAE for a single picture, computed channels-last with fused norms.

The first frame of a video has two frames of zeros before it, so each causal convolution is a 2-D one with its last tap:
a third of the multiplications. `recompute` encodes one picture a block this way.
"""

from __future__ import annotations

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    AutoencoderKLWan,
    WanAttentionBlock,
    WanCausalConv3d,
    WanEncoder3d,
    WanResample,
    WanResidualBlock,
    WanRMS_norm,
)
from torch.nn import functional as F

from .norm_silu import PendingSum, norm_sum
from .residual_blocks import (
    apply_attention,
    apply_mid_block,
    apply_residual_block,
    from_diffusers,
    spatial_padding,
    to_diffusers,
)


def encode_first_frame(vae: AutoencoderKLWan, frame: torch.Tensor) -> torch.Tensor:
    """The parameters of the posterior of one picture, as `vae.encode` computes them for a video of one frame.

    Args:
        vae: Wan 2.1's VAE.
        frame: [1, 3, 1, height, width] in -1..1, on the VAE's device and in its dtype.

    Returns:
        Means and log-variances [1, 2 * z_dim, 1, height / 8, width / 8].
    """
    return vae.quant_conv(to_diffusers(_encode(vae.encoder, from_diffusers(frame))))


def _encode(encoder: WanEncoder3d, frame: torch.Tensor) -> torch.Tensor:
    value = PendingSum(_convolve_last_tap(encoder.conv_in, frame), encoder.conv_in.bias)
    for block in encoder.down_blocks:
        if isinstance(block, WanResidualBlock):
            value = apply_residual_block(block, value, _convolve_normed)
        elif isinstance(block, WanAttentionBlock):
            value = apply_attention(block, value)
        else:
            value = _downsample(block, value)
    value = apply_mid_block(encoder.mid_block, value, _convolve_normed)
    encoded = _convolve_normed(encoder.norm_out, encoder.conv_out, value)
    return encoded.add_(encoder.conv_out.bias)


def _downsample(resample: WanResample, value: PendingSum) -> PendingSum:
    # A first frame is not downsampled in time.
    made = resample.resample(value.add_up().permute(0, 3, 1, 2))
    return PendingSum(made.permute(0, 2, 3, 1).contiguous())


def _convolve_normed(norm: WanRMS_norm, convolution: WanCausalConv3d, value: PendingSum) -> torch.Tensor:
    return _convolve_last_tap(convolution, norm_sum(value, norm.gamma.flatten()))


def _convolve_last_tap(convolution: WanCausalConv3d, frame: torch.Tensor) -> torch.Tensor:
    """[1, height, width, channels] to [1, height, width, out channels], without the bias."""
    # Its own call would be one over three frames; who watches its calls is told of this one.
    for hook in tuple(convolution._forward_pre_hooks.values()):
        hook(convolution, (frame,))
    weight = convolution.weight[:, :, -1].contiguous(memory_format=torch.channels_last)
    made = F.conv2d(frame.permute(0, 3, 1, 2), weight, padding=spatial_padding(convolution))
    return made.permute(0, 2, 3, 1).contiguous()
