"""How far pictures are from one another."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import torch


def jumps(frames: torch.Tensor) -> list[float]:
    """Mean absolute differences (0..1) between neighbouring pictures, uint8 [F, height, width, 3]."""
    return (frames.float() / 255.0).diff(dim=0).abs().mean((1, 2, 3)).tolist()


def seam_jumps(blocks: Sequence[torch.Tensor]) -> tuple[float, ...]:
    """The same between the last picture of each block and the first of the next."""
    return tuple(jumps(torch.stack((before[-1], after[0])))[0] for before, after in pairwise(blocks))


def psnr_of(error: float) -> float:
    """PSNR in dB of a mean squared error, 255 being the peak."""
    return 10.0 * math.log10(255.0**2 / max(error, 1e-12))
