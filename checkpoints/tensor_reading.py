"""Read tensors of a checkpoint some rows at a time: into memory, into a quantized weight, or out of one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..ops.weight_filling import CHUNK_ELEMENTS, WeightFilling, row_chunks
from .checkpoint_files import TensorHeader, TensorSource, open_checkpoint
from .comfy_format import StoredWeight, read_scale

# Which rows, and what is in them. Everything, `...`, for what is read at once.
Rows = tuple[Any, torch.Tensor]


def read_rows(opened: Any, key: str, header: TensorHeader) -> Iterator[Rows]:  # noqa: ANN401
    """The tensor `key` of an open file, in chunks of rows on the file's device; a small one in a single chunk."""
    if header.elements <= CHUNK_ELEMENTS:
        yield ..., opened.get_tensor(key)
        return
    part = opened.get_slice(key)
    for rows in row_chunks(header.shape[0], header.elements // header.shape[0]):
        yield rows, part[rows]


def observe_all(filling: WeightFilling, parts: Iterable[tuple[TensorSource, TensorHeader]]) -> None:
    """Show `filling` all rows of all its parts, in whichever files they are; they are read again to be written.

    Raises ValueError for inf or NaN in them.
    """
    for source, header in parts:
        with open_checkpoint(source.file, filling.device) as opened:
            for _, values in read_rows(opened, source.key, header):
                filling.observe(values)


def fill_quantized(
    filling: WeightFilling,
    start: int,
    chunks: Iterable[Rows],
    stored: StoredWeight | None,
    opened: Any = None,  # noqa: ANN401
) -> int:
    """Write the chunks of one tensor into the rows of `filling` from `start`; the bytes they take there.

    Values are quantized; what is `stored` quantized is taken as it is, with its scale, from `opened` when that is
    the file the scale is in.
    """
    scale = None if stored is None else read_scale(stored.scale, filling.device, opened)
    written = 0
    for _, values in chunks:
        count = values.shape[0]
        if scale is None:
            filling.write(start + written, values)
        else:
            own = scale if scale.numel() == 1 else scale[written : written + count]
            filling.copy_rows(start + written, values, own)
        written += count
    taken = filling.bytes_of(written)
    return taken if stored is None else taken + _take_input_scale(filling, stored)


def dequantized(chunks: Iterable[Rows], stored: StoredWeight) -> Iterator[Rows]:
    """The chunks of a stored weight, each multiplied by its scale, in float32."""
    scale: torch.Tensor | None = None
    for rows, values in chunks:
        if scale is None:
            scale = read_scale(stored.scale, values.device).reshape(-1, 1)
        yield rows, values.to(torch.float32) * (scale if scale.numel() == 1 else scale[rows])


def _take_input_scale(filling: WeightFilling, stored: StoredWeight) -> int:
    """Keep the scale of static activations; the largest where fused parts differ. Bytes it takes for the first."""
    if filling.spec.activations != "static":
        return 0
    if stored.input_scale is None:
        return 0
    scale = read_scale(stored.input_scale, filling.device).amax().reshape(1, 1)
    known = filling.input_scale
    filling.input_scale = scale if known is None else torch.maximum(known, scale)
    return 0 if known is not None else scale.element_size()
