"""Parts of Wan 2.1's VAE on [frames, height, width, channels] that fused encoder and decoder share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import (
    WanAttentionBlock,
    WanCausalConv3d,
    WanMidBlock,
    WanResidualBlock,
    WanRMS_norm,
)
from torch.nn import functional as F

from .norm_silu import PendingSum

Features = list[torch.Tensor | str | None]


class AnyFeatures(Protocol):
    """diffusers' list of features, or what stands for it."""

    def __getitem__(self, index: int, /) -> torch.Tensor | str | None:
        """A feature as diffusers keeps it."""

    def __setitem__(self, index: int, value: torch.Tensor | str | None, /) -> None:
        """Keep a feature."""


# Adds up the sum, norms it and convolves; returns the convolution without its bias.
NormedConvolution = Callable[[WanRMS_norm, WanCausalConv3d, PendingSum], torch.Tensor]


def takes_fused_passes(config: Mapping[str, Any]) -> bool:
    """Whether fused encoder and decoder compute the VAE of this config: the blocks of Wan 2.2's have shortcuts.

    A tiny decoder is no VAE.
    """
    return not config.get("is_residual", True)


def apply_residual_block(block: WanResidualBlock, value: PendingSum, convolve: NormedConvolution) -> PendingSum:
    """Two normed convolutions beside a shortcut."""
    inner = PendingSum(convolve(block.norm1, block.conv1, value), block.conv1.bias)
    outer = convolve(block.norm2, block.conv2, inner)
    total, shortcut = value.first, block.conv_shortcut
    if isinstance(shortcut, WanCausalConv3d):
        total = F.linear(total, shortcut.weight.flatten(1), shortcut.bias)
    return PendingSum(outer, block.conv2.bias, total)


def apply_mid_block(block: WanMidBlock, value: PendingSum, convolve: NormedConvolution) -> PendingSum:
    """Residual blocks with attention between them."""
    value = apply_residual_block(block.resnets[0], value, convolve)
    for attention, resnet in zip(block.attentions, block.resnets[1:], strict=True):
        value = apply_residual_block(resnet, apply_attention(attention, value), convolve)
    return value


def apply_attention(block: WanAttentionBlock, value: PendingSum) -> PendingSum:
    """diffusers' own attention within each frame."""
    made: Any = block(to_diffusers(value.add_up()))
    return PendingSum(from_diffusers(made))


def to_diffusers(value: torch.Tensor) -> torch.Tensor:
    """[frames, height, width, channels] as [1, channels, frames, height, width], in the same memory."""
    return value.permute(3, 0, 1, 2).unsqueeze(0)


def from_diffusers(value: torch.Tensor) -> torch.Tensor:
    """[1, channels, frames, height, width] as [frames, height, width, channels]; copied unless channels-last."""
    return value[0].permute(1, 2, 3, 0).contiguous()


def spatial_padding(convolution: WanCausalConv3d) -> tuple[int, int]:
    """Rows and columns that the convolution pads on each side."""
    # The padding is a private attribute of the class: columns, rows and frames, at both ends.
    left, _, top, _, _, _ = convolution._padding
    return top, left
