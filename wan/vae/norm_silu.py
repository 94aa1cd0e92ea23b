"""The work between two convolutions of Wan's VAE, in one pass over memory: sum, norm, SiLU, past frames.

In plain torch, the sum of bias and residual, the RMS norm, SiLU, the concatenation with the cached frames and the new
cache are seven reads and seven writes of a tensor that at 832x480 has 307 MB. On CUDA one Triton kernel reads each
input once and writes each output once; elsewhere the same is computed by torch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...ops.kernels.norm_silu_launch import (
    EPSILON,
    NORM_SILU,
    PAST_FRAMES,
    NormBuffers,
    NormVariant,
    launch_norm_silu,
)

TAPS = PAST_FRAMES + 1


@dataclass
class PendingSum:
    """A sum that is not computed yet; its first reader adds it up in place, in `first`.

    Attributes:
        first: [frames, height, width, channels], contiguous.
        bias: [channels]; None if absent or already added.
        residual: the shape of `first`; None if absent or already added.
    """

    first: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def add_up(self) -> torch.Tensor:
        """Add bias and residual to `first` in place; returns `first`."""
        for summand in (self.bias, self.residual):
            if summand is not None:
                self.first.add_(summand)
        return self.forget_summands()

    def forget_summands(self) -> torch.Tensor:
        """Mark bias and residual as added and free the residual; returns `first`."""
        self.bias = self.residual = None
        return self.first


@dataclass(frozen=True)
class NormedWindow:
    """What `norm_into_window` returns.

    Attributes:
        window: the past frames, then the normed ones, [2 + frames, height, width, channels]; if folded, for each
            frame the three that the convolution reads, oldest first, [frames, height, width, 3 * channels].
        past: the last two frames of the window, [2, height, width, channels]: the cache of the next call.
    """

    window: torch.Tensor
    past: torch.Tensor


def norm_into_window(value: PendingSum, gamma: torch.Tensor, past: torch.Tensor, *, fold: bool) -> NormedWindow:
    """Add up, norm (see `norm_sum`), and append to the past.

    Args:
        value: of any float dtype; added up.
        gamma: [channels], the norm's weight.
        past: [2, height, width, channels], normed, contiguous; not modified.
        fold: return the window folded.
    """
    frames, height, width, channels = value.first.shape
    kernel = _load_kernel(value, has_past=True, fold=fold)
    if kernel is not None:
        shape = (frames, height, width, TAPS * channels) if fold else (PAST_FRAMES + frames, height, width, channels)
        normed = NormedWindow(value.first.new_empty(shape), torch.empty_like(past))
        _launch(kernel, value, gamma, normed.window, past, normed.past, fold=fold)
        return normed
    window = torch.cat([past, norm_sum(value, gamma)])
    new_past = window[-PAST_FRAMES:].clone()
    if fold:
        window = torch.cat([window[tap : tap + frames] for tap in range(TAPS)], dim=-1)
    return NormedWindow(window, new_past)


def norm_sum(value: PendingSum, gamma: torch.Tensor) -> torch.Tensor:
    """Add up and norm: SiLU(x / |x| * sqrt(channels) * gamma), |x| over channels.

    Args:
        value: of any float dtype; added up.
        gamma: [channels], the norm's weight.

    Returns:
        The normed sum, the shape and dtype of `value`.
    """
    kernel = _load_kernel(value, has_past=False, fold=False)
    if kernel is not None:
        normed = torch.empty_like(value.first)
        _launch(kernel, value, gamma, normed)
        return normed
    total = value.add_up()
    weight = total.shape[-1] ** 0.5 * gamma.float()
    return F.silu(F.normalize(total.float(), dim=-1, eps=EPSILON) * weight).to(total.dtype)


def _load_kernel(value: PendingSum, *, has_past: bool, fold: bool) -> Any:  # noqa: ANN401
    channels = value.first.shape[-1]
    variant = NormVariant(channels, value.bias is not None, value.residual is not None, has_past, fold)
    return NORM_SILU.load(value.first.device, value.first.dtype, variant)


def _launch(
    kernel: Any,  # noqa: ANN401
    value: PendingSum,
    gamma: torch.Tensor,
    window: torch.Tensor,
    past: torch.Tensor | None = None,
    new_past: torch.Tensor | None = None,
    *,
    fold: bool = False,
) -> None:
    buffers = NormBuffers(value.first, value.bias, value.residual, gamma, window, past, new_past)
    launch_norm_silu(kernel, buffers, fold=fold)
    value.forget_summands()
