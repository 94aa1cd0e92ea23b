"""The kernel of the VAE's `norm_silu`: sum, norm, SiLU and the past frames in one pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .kernel import Kernel, KernelName, launch, next_power_of_two

# Past frames that a causal convolution with 3 taps reads.
PAST_FRAMES = 2
# The default of torch.nn.functional.normalize, which the VAE's norm uses.
EPSILON = 1e-12
# 32 values for each of the 128 threads of a program: several wide loads in flight, few registers.
_VALUES_PER_PROGRAM = 4096


class NormVariant(NamedTuple):
    """What the kernel is compiled for."""

    channels: int
    has_bias: bool
    has_residual: bool
    has_past: bool
    fold: bool


class NormBuffers(NamedTuple):
    """What the kernel reads and writes, all contiguous and of one dtype.

    Attributes:
        first: [frames, height, width, channels]; the sum is written into it.
        bias: [channels], or None.
        residual: the shape of `first`, or None.
        gamma: [channels], the norm's weight.
        window: written. The shape of `first`; with a past, two more frames at the front; folded,
            [frames, height, width, 3 * channels].
        past: [2, height, width, channels], or None.
        new_past: the shape of `past`, written; None if `past` is None.
    """

    first: torch.Tensor
    bias: torch.Tensor | None
    residual: torch.Tensor | None
    gamma: torch.Tensor
    window: torch.Tensor
    past: torch.Tensor | None
    new_past: torch.Tensor | None


def launch_norm_silu(kernel: Any, buffers: NormBuffers, *, fold: bool) -> None:  # noqa: ANN401
    """Add up, norm, and fill `window`, and `new_past` where there is a past.

    Args:
        kernel: of `NORM_SILU.load`.
        buffers: see `NormBuffers`.
        fold: whether the window is folded.
    """
    first, bias, residual, gamma, window, past, new_past = buffers
    frames, height, width, channels = first.shape
    past_frames = 0 if past is None else PAST_FRAMES
    block_channels = max(16, next_power_of_two(channels))
    block_pixels = max(1, _VALUES_PER_PROGRAM // block_channels)
    launch(
        kernel,
        (-(-height * width // block_pixels), past_frames + frames),
        first.device,
        first,
        # Absent inputs are not read, but a pointer must be passed.
        first if bias is None else bias,
        first if residual is None else residual,
        gamma,
        window if past is None else past,
        window,
        window if new_past is None else new_past,
        frames,
        height * width,
        channels,
        channels**0.5,
        EPSILON,
        HAS_BIAS=bias is not None,
        HAS_RESIDUAL=residual is not None,
        PAST_FRAMES=past_frames,
        FOLD=fold,
        BLOCK_PIXELS=block_pixels,
        BLOCK_CHANNELS=block_channels,
    )


def _try_out(kernel: Any, device: torch.device, dtype: torch.dtype, variant: NormVariant) -> None:  # noqa: ANN401
    channels, has_bias, has_residual, has_past, fold = variant
    frame = torch.zeros((1, 1, 1, channels), device=device, dtype=dtype)
    past = frame.new_zeros((PAST_FRAMES, 1, 1, channels)) if has_past else None
    # Room for the largest window, the folded one: three frames side by side.
    buffers = NormBuffers(
        first=frame,
        bias=frame.new_zeros(channels) if has_bias else None,
        residual=torch.zeros_like(frame) if has_residual else None,
        gamma=frame.new_zeros(channels),
        window=frame.new_empty((1 + PAST_FRAMES, 1, 1, channels)),
        past=past,
        new_past=None if past is None else torch.empty_like(past),
    )
    launch_norm_silu(kernel, buffers, fold=fold)


NORM_SILU = Kernel(KernelName.NORM_SILU, "norm_silu_triton.add_norm_silu", _try_out)
