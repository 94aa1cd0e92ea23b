"""Where the rows of a tensor come from, a few at a time.

A `RowSource` gives the rows of a tensor, from a file or from another `RowSource`; a `Destination` (see
`destinations.py`) writes them into the module.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from .checkpoint_files import CheckpointError

# First row of a chunk, and its rows. A tensor without axes is one row.
RowChunk = tuple[int, torch.Tensor]


class RowSource(Protocol):
    """A tensor that is read some rows at a time and never held whole."""

    @property
    def file(self) -> Path:
        """The file it is stored in."""

    @property
    def key(self) -> str:
        """Its name in the file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole tensor."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the rows."""

    def chunks(self, device: torch.device) -> Iterator[RowChunk]:
        """All rows in order, in chunks of some megabytes, on `device`."""


@dataclass(frozen=True)
class _EightBitRows:
    """A weight that a file holds in 8 bits, with its scale; read as a `RowSource` it is dequantized to float32."""

    values: RowSource
    scale: RowSource

    @property
    def file(self) -> Path:
        """Of the values."""
        return self.values.file

    @property
    def key(self) -> str:
        """Of the values."""
        return self.values.key

    @property
    def shape(self) -> tuple[int, ...]:
        """[out, in]."""
        return self.values.shape

    @property
    def dtype(self) -> torch.dtype:
        """What the rows are dequantized to."""
        return torch.float32

    def chunks(self, device: torch.device) -> Iterator[RowChunk]:
        """The dequantized rows."""
        for start, values, scale in self.quantized_chunks(device):
            yield start, values.to(torch.float32) * scale.reshape(-1, *[1] * (values.ndim - 1))

    def quantized_chunks(self, device: torch.device) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """The rows as they are stored, each chunk with its float32 scale, [1, 1] or [rows, 1]."""
        scale = read_scale(self.scale, device).reshape(-1, 1)
        for start, values in self.values.chunks(device):
            yield start, values, scale if scale.numel() == 1 else scale[start : start + values.shape[0]]


@dataclass(frozen=True)
class QuantizedRows(_EightBitRows):
    """A weight that a file holds in 8 bits, in a format that can be computed with.

    Attributes:
        values: float8 or int8, [out, in].
        scale: of 1 element or one per row; weight = values * scale.
        format: ComfyUI's name of the format, such as `float8_e4m3fn`.
        input_scale: scale of static activations, or None.
        full_precision: the file wants products in full precision, so activations are not quantized.
    """

    format: str
    input_scale: RowSource | None = None
    full_precision: bool = False


@dataclass(frozen=True)
class ScaledRows(_EightBitRows):
    """A weight that a file holds in 8 bits and that is always dequantized, to float32, while it is read.

    Attributes:
        values: float8, [out, in].
        scale: of 1 element or one per row; weight = values * scale.
    """


def row_count(source: RowSource) -> int:
    """How many rows `source` has; 1 for a tensor without axes."""
    return source.shape[0] if source.shape else 1


def elements(source: RowSource) -> int:
    """How many numbers `source` has."""
    return torch.Size(source.shape).numel()


def read_whole(source: RowSource, device: torch.device | str = "cpu") -> torch.Tensor:
    """All of a small tensor, in its shape."""
    chunks = [values for _, values in source.chunks(torch.device(device))]
    return torch.cat(chunks).reshape(source.shape) if chunks else torch.empty(source.shape, dtype=source.dtype)


def read_scale(source: RowSource, device: torch.device | str) -> torch.Tensor:
    """A stored scale as float32 [1] or [rows] on `device`; raises CheckpointError if it is not finite or negative."""
    scale = read_whole(source, device).to(torch.float32).reshape(-1)
    if not bool(torch.isfinite(scale).all()) or bool((scale < 0).any()):
        raise CheckpointError(f"{source.key} in {source.file} is not finite or negative: download the file again.")
    return scale
