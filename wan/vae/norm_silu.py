"""What stands between two convolutions of Wan's VAE, in one pass over memory: sum, norm, SiLU, frames of the past.

Written out, the sum of bias and residual, the RMS norm, SiLU, the concatenation with the cached frames and the new
cache are seven reads and seven writes of a tensor that at 832x480 has 307 MB. On CUDA one Triton kernel reads each
input once and writes each output once; elsewhere the same is computed by torch.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from ...ops.triton_kernels import runs_kernel_on

# Frames that a causal convolution with 3 taps looks back.
PAST_FRAMES = 2
TAPS = PAST_FRAMES + 1
# Of torch.nn.functional.normalize, which Wan's norm is made of.
_EPSILON = 1e-12
# 32 values for each of the 128 threads of a program: several wide loads in flight, few registers.
_VALUES_PER_PROGRAM = 4096


@dataclass
class PendingSum:
    """A tensor that is still a sum; whoever reads it first adds it up, in `first`'s memory.

    Attributes:
        first: [frames, height, width, channels], contiguous.
        bias: [channels]; None where there is none, or none any more.
        residual: the shape of `first`; None where there is none, or none any more.
    """

    first: torch.Tensor
    bias: torch.Tensor | None = None
    residual: torch.Tensor | None = None

    def add_up(self) -> torch.Tensor:
        """`first`, with all the rest added to it."""
        for summand in (self.bias, self.residual):
            if summand is not None:
                self.first.add_(summand)
        return self.forget_summands()

    def forget_summands(self) -> torch.Tensor:
        """`first`, to which somebody has added the rest; gives the residual's memory free."""
        self.bias = self.residual = None
        return self.first


@dataclass(frozen=True)
class NormedWindow:
    """What `norm_into_window` gives.

    Attributes:
        window: normed frames behind those of the past, [2 + frames, height, width, channels]; folded, for each
            frame the three that the convolution reads, oldest first, [frames, height, width, 3 * channels].
        past: the last two frames of the window, [2, height, width, channels]: the cache of the next call.
    """

    window: torch.Tensor
    past: torch.Tensor


def norm_into_window(value: PendingSum, gamma: torch.Tensor, past: torch.Tensor, *, fold: bool) -> NormedWindow:
    """Add up, norm (see `norm_sum`), and put behind the past.

    Args:
        value: of any float dtype; added up.
        gamma: [channels], the norm's weight.
        past: [2, height, width, channels], normed, contiguous; left as it is.
        fold: give the window folded.
    """
    frames, height, width, channels = value.first.shape
    if runs_kernel_on(value.first.device):
        shape = (frames, height, width, TAPS * channels) if fold else (PAST_FRAMES + frames, height, width, channels)
        normed = NormedWindow(value.first.new_empty(shape), torch.empty_like(past))
        _launch_kernel(value, gamma, normed.window, past, normed.past, fold=fold)
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
    if runs_kernel_on(value.first.device):
        normed = torch.empty_like(value.first)
        _launch_kernel(value, gamma, normed, None, None, fold=False)
        return normed
    total = value.add_up()
    weight = total.shape[-1] ** 0.5 * gamma.float()
    return F.silu(F.normalize(total.float(), dim=-1, eps=_EPSILON) * weight).to(total.dtype)


@functools.cache
def _kernel() -> Any:  # noqa: ANN401
    # Here, because Triton is not installed on machines without a GPU, and takes a second to import.
    from .norm_silu_kernel import add_norm_silu

    return add_norm_silu


def _launch_kernel(
    value: PendingSum,
    gamma: torch.Tensor,
    window: torch.Tensor,
    past: torch.Tensor | None,
    new_past: torch.Tensor | None,
    *,
    fold: bool,
) -> None:
    """Add `value` up and fill `window`, and `new_past` where there is a past."""
    frames, height, width, channels = value.first.shape
    past_frames = 0 if past is None else PAST_FRAMES
    block_channels = max(16, 1 << (channels - 1).bit_length())
    block_pixels = max(1, _VALUES_PER_PROGRAM // block_channels)
    grid = (-(-height * width // block_pixels), past_frames + frames)
    with torch.cuda.device(value.first.device):
        _kernel()[grid](
            value.first,
            # What is not there is not read; a pointer must be given all the same.
            value.first if value.bias is None else value.bias,
            value.first if value.residual is None else value.residual,
            gamma,
            window if past is None else past,
            window,
            window if new_past is None else new_past,
            frames,
            height * width,
            channels,
            channels**0.5,
            _EPSILON,
            HAS_BIAS=value.bias is not None,
            HAS_RESIDUAL=value.residual is not None,
            PAST_FRAMES=past_frames,
            FOLD=fold,
            BLOCK_PIXELS=block_pixels,
            BLOCK_CHANNELS=block_channels,
        )
    value.forget_summands()
