"""Tokens of a KV cache in 8 bits with a scale per token and head: INT8, or e4m3fn.

A head's values of one token are spread much like noise, without outliers. INT8 divides their range into 254 even steps;
e4m3fn spends its bits on a range of exponents that a scale per token leaves unused.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...ops.fp8_linear import FP8_DTYPE, FP8_MAX, fp8_scale, largest_magnitude, round_to_fp8
from ...ops.token_copies import copy_tokens
from .kv_cache import move_tokens

PACKED_DTYPES = (FP8_DTYPE, torch.int8)

_INT8_MAX = 127.0
_SMALLEST_SCALE = torch.finfo(torch.float32).tiny
# The steps of e4m3fn: 3 bits of mantissa, down to those of the smallest normal number.
_STEPS_PER_POWER = 2**3
_SMALLEST_NORMAL = 2.0**-6
_EXPONENT_BITS = 0x7F800000


class Packing(NamedTuple):
    """How much of the past is kept in 8 bits.

    Attributes:
        frames: latent frames.
        dtype: int8 or float8_e4m3fn.
    """

    frames: int
    dtype: torch.dtype


class PackedTokens(NamedTuple):
    """Keys or values of one layer in 8 bits.

    Attributes:
        data: int8 or e4m3fn [1, tokens, heads, head_dim].
        scale: float32 [1, tokens, heads, 1].
    """

    data: torch.Tensor
    scale: torch.Tensor

    @classmethod
    def allocate(cls, tokens: int, heads: int, head_dim: int, device: torch.device, dtype: torch.dtype) -> PackedTokens:
        """Room for so many tokens."""
        return cls(
            torch.zeros((1, tokens, heads, head_dim), dtype=dtype, device=device),
            torch.zeros((1, tokens, heads, 1), dtype=torch.float32, device=device),
        )

    def unpack_to(self, buffer: torch.Tensor, tokens: int) -> None:
        """Write the first tokens to the front of `buffer` [1, capacity, heads, head_dim], in its dtype."""
        front = buffer[:, :tokens]
        front.copy_(self.data[:, :tokens])
        front.mul_(self.scale[:, :tokens])

    def pack_from(self, buffer: torch.Tensor, start: int, end: int) -> None:
        """Take tokens `start` to `end` of `buffer`, to the same places."""
        values = buffer[:, start:end]
        scale = _find_scale(values, self.data.dtype)
        packed = round_to_int8(values, scale) if self.data.dtype == torch.int8 else round_to_fp8(values, scale)
        self.scale[:, start:end] = scale
        copy_tokens(self.data, start, packed)

    def move(self, start: int, end: int, target: int) -> None:
        """Move tokens `start` to `end` to the places from `target` on."""
        for part in (self.data.view(torch.uint8), self.scale):
            move_tokens(part, start, end, target)


def as_packed(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """`values` [..., head_dim] as they are after `PackedTokens.pack_from` and `unpack_to`, in their own dtype.

    Rounded in float32: this runs inside compiled layers, and not every device's compiler knows e4m3fn.
    """
    scale = _find_scale(values, dtype)
    if dtype == torch.int8:
        return (_to_int8_steps(values, scale) * scale).to(values.dtype)
    scaled = (values.float() / scale).clamp(-FP8_MAX, FP8_MAX)
    # The power of two below each value.
    power = (scaled.view(torch.int32) & _EXPONENT_BITS).view(torch.float32)
    step = power.clamp(min=_SMALLEST_NORMAL) / _STEPS_PER_POWER
    return ((scaled / step).round() * step * scale).to(values.dtype)


def round_to_int8(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """`values` / `scale`, rounded to nearest even and clamped to -127..127."""
    return _to_int8_steps(values, scale).to(torch.int8)


def _to_int8_steps(values: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return (values.float() / scale).round_().clamp_(-_INT8_MAX, _INT8_MAX)


def _find_scale(values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    magnitude = largest_magnitude(values, "per row")
    return fp8_scale(magnitude) if dtype == FP8_DTYPE else (magnitude / _INT8_MAX).clamp(min=_SMALLEST_SCALE)
