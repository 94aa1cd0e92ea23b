"""Rows of a weight that a LoRA changes, computed in float32 while they are read.

Each change is a `RowSource` around a `RowSource`, so several add up, and what comes behind (casting, quantizing) sees
the merged weight only. The matrices of a change are read when the rows of its weight are, and freed behind them.

Formulas: LoRA (https://arxiv.org/abs/2106.09685), W + s * alpha / r * B A; DoRA (https://arxiv.org/abs/2402.09353),
with the norm that ComfyUI's `weight_decompose` takes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from .checkpoint_files import CheckpointError
from .row_sources import QuantizedRows, RowChunk, RowSource, row_count

# From float32 rows and the number of the first to the changed rows.
Change = Callable[[torch.Tensor, int], torch.Tensor]

_EPSILON = torch.finfo(torch.float32).eps


@dataclass(frozen=True)
class ChangedRows(ABC):
    """A tensor with a change on it.

    Attributes:
        base: the tensor before.
        strength: factor of the change.
    """

    base: RowSource
    strength: float

    @property
    def file(self) -> Path:
        """Of the tensor before."""
        return self.base.file

    @property
    def key(self) -> str:
        """Of the tensor before."""
        return self.base.key

    @property
    def shape(self) -> tuple[int, ...]:
        """The same before and after."""
        return self.base.shape

    @property
    def dtype(self) -> torch.dtype:
        """What changed rows are computed in."""
        return torch.float32

    def chunks(self, device: torch.device) -> Iterator[RowChunk]:
        """The changed rows; raises CheckpointError for inf or NaN in the change."""
        # No generator: its frame would hold the rows before the change until the next are asked for.
        return map(partial(_change_chunk, self.read_change(device)), self.base.chunks(device))

    @abstractmethod
    def read_change(self, device: torch.device) -> Change:
        """Read what the change needs, to `device`; the rows come in order."""


@dataclass(frozen=True)
class LowRankPair:
    """The two matrices of a LoRA; convolutions count with their kernels in the columns.

    Attributes:
        up: B, [out, rank].
        down: A, [rank, in].
        alpha: one number, the product is times alpha / rank; None for 1.
    """

    up: RowSource
    down: RowSource
    alpha: RowSource | None = None

    def read(self, device: torch.device) -> LoadedPair:
        """Both matrices in float32 on `device`."""
        down = _read_finite(self.down, device).flatten(1)
        alpha = down.shape[0] if self.alpha is None else float(_read_finite(self.alpha, torch.device("cpu")).sum())
        return LoadedPair(_read_finite(self.up, device).flatten(1), down, alpha / down.shape[0])


@dataclass(frozen=True)
class LoadedPair:
    """A pair in memory: `up` [out, rank] and `down` [rank, in], float32, and alpha / rank."""

    up: torch.Tensor
    down: torch.Tensor
    factor: float

    def add_to(self, rows: torch.Tensor, start: int, strength: float) -> torch.Tensor:
        """`rows` of the weight, the first of which is row `start`, with the product added."""
        up = self.up[start : start + rows.shape[0]]
        return torch.addmm(rows.flatten(1), up, self.down, alpha=strength * self.factor).view(rows.shape)


@dataclass(frozen=True)
class LowRankRows(ChangedRows):
    """W + strength * alpha / rank * B A."""

    pair: LowRankPair

    def read_change(self, device: torch.device) -> Change:
        """Read the matrices."""
        return partial(self.pair.read(device).add_to, strength=self.strength)


@dataclass(frozen=True)
class DifferenceRows(ChangedRows):
    """W + strength * difference, for weights, biases and gains of norms."""

    difference: RowSource

    def read_change(self, device: torch.device) -> Change:
        """Of the difference no more rows are held than of the tensor."""
        differences = _RowsInStep(self.difference.chunks(device))

        def change(rows: torch.Tensor, start: int) -> torch.Tensor:
            difference = differences.take(rows.shape[0]).to(torch.float32)
            _check_finite(difference, self.difference)
            return torch.add(rows, difference, alpha=self.strength)

        return change


@dataclass(frozen=True)
class DecomposedRows(ChangedRows):
    """W + strength * (magnitude * (W + alpha / rank * B A) / norm - W).

    As ComfyUI computes it: a magnitude per row is over the norm of the row of W, one per column over that of the column
    of the merged weight, for which all rows are read once before.

    Attributes:
        pair: the matrices.
        magnitude: one number per row or per column.
    """

    pair: LowRankPair
    magnitude: RowSource

    def read_change(self, device: torch.device) -> Change:
        """Read the matrices and the magnitude, and the whole weight for norms of columns."""
        pair = self.pair.read(device)
        per_row = has_magnitude_per_row(self.magnitude.shape, self.shape)
        ones = (1,) * (len(self.shape) - 2)
        scales = _read_finite(self.magnitude, device).reshape((-1, 1, *ones) if per_row else (1, -1, *ones))
        if not per_row:
            scales = scales / (self._column_norms(pair, device) + _EPSILON)

        def change(rows: torch.Tensor, start: int) -> torch.Tensor:
            scale = scales
            if per_row:
                scale = scales[start : start + rows.shape[0]] / (_row_norms(rows) + _EPSILON)
            merged = pair.add_to(rows, start, strength=1.0).mul_(scale)
            return merged if self.strength == 1.0 else torch.lerp(rows, merged, self.strength)

        return change

    def _column_norms(self, pair: LoadedPair, device: torch.device) -> torch.Tensor:
        """Of the merged weight, [1, in, 1...]."""
        columns = self.shape[1]
        squares = torch.zeros((1, columns, *self.shape[2:]), device=device)
        for start, values in self.base.chunks(device):
            squares += pair.add_to(values.to(torch.float32), start, strength=1.0).square_().sum(0, keepdim=True)
        return squares.view(1, columns, -1).sum(2).sqrt_().view(1, columns, *(1,) * (len(self.shape) - 2))


def has_magnitude_per_row(magnitude: tuple[int, ...], weight: tuple[int, ...]) -> bool:
    """Whether a DoRA magnitude of this shape is per row of the weight, else it is per column; as ComfyUI decides."""
    return bool(magnitude) and magnitude[0] == weight[0]


def unchanged(source: RowSource) -> RowSource:
    """`source` without the changes on it."""
    while isinstance(source, ChangedRows):
        source = source.base
    return source


def stored_quantized(source: RowSource) -> QuantizedRows | None:
    """The quantized tensor that a file holds for `source`, whatever is changed on it; None for an unquantized one."""
    stored = unchanged(source)
    return stored if isinstance(stored, QuantizedRows) else None


class _RowsInStep:
    """Rows out of chunks, as many as are asked for: chunks of two files need not have the same length."""

    def __init__(self, chunks: Iterator[RowChunk]) -> None:
        self._chunks = chunks
        self._rest: torch.Tensor | None = None

    def take(self, count: int) -> torch.Tensor:
        """The next `count` rows."""
        rest = self._rest
        while rest is None or rest.shape[0] < count:
            _, more = next(self._chunks)
            rest = more if rest is None else torch.cat([rest, more])
        self._rest = rest[count:] if rest.shape[0] > count else None
        return rest[:count]


def _change_chunk(change: Change, chunk: RowChunk) -> RowChunk:
    start, values = chunk
    return start, change(values.to(torch.float32), start)


def _read_finite(source: RowSource, device: torch.device) -> torch.Tensor:
    """All of a small tensor in float32, in its shape; raises CheckpointError for inf or NaN."""
    whole = torch.empty((row_count(source), *source.shape[1:]), dtype=torch.float32, device=device)
    for start, values in source.chunks(device):
        whole[start : start + values.shape[0]] = values
    _check_finite(whole, source)
    return whole.view(source.shape)


def _row_norms(rows: torch.Tensor) -> torch.Tensor:
    """Of each row, [rows, 1...]."""
    return rows.flatten(1).norm(dim=1).view(-1, *(1,) * (rows.ndim - 1))


def _check_finite(values: torch.Tensor, source: RowSource) -> None:
    if not bool(torch.isfinite(values).all()):
        raise CheckpointError(
            f"{source.key} in the LoRA {source.file} holds inf or NaN: download the file again, or leave the LoRA out."
        )
