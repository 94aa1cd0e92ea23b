"""Reads safetensors files by offset: the header, and the rows of a tensor. No file is mapped into memory.

`safetensors.safe_open` maps the whole file privately, which fails for a file larger than the machine's memory without
swap, and kills the process when a mapped file is truncated. The format (https://github.com/huggingface/safetensors):
8 bytes with the header's length, little-endian; the header, a JSON object; the tensors, row-major, without gaps.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.weight_filling import row_chunks
from .checkpoint_files import CheckpointError
from .file_bytes import open_file, read_into
from .row_sources import RowChunk, RowSource

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_METADATA_KEY = "__metadata__"
_LENGTH_BYTES = 8
# The limit of safetensors' own reader.
_LARGEST_HEADER = 100_000_000


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a safetensors file, as the file's header describes it; a `RowSource`.

    Attributes:
        file: where it is stored.
        key: its name in the file.
        shape: of the tensor.
        dtype_name: safetensors' name of its dtype.
        offset: of its first byte from the beginning of the file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype_name: str
    offset: int

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements; raises CheckpointError for an unsupported dtype."""
        dtype = DTYPES.get(self.dtype_name)
        if dtype is None:
            raise CheckpointError(
                f"{self.key} in {self.file} has the dtype {self.dtype_name}, allowed are {', '.join(DTYPES)}: give an "
                "unquantized checkpoint."
            )
        return dtype

    def chunks(self, device: torch.device) -> Iterator[RowChunk]:
        """All rows, some megabytes at a time; raises CheckpointError for a file that has become shorter."""
        rows = self.shape[0] if self.shape else 1
        row_shape = self.shape[1:]
        row_elements = torch.Size(row_shape).numel()
        pinned = device.type == "cuda"
        with open_file(self.file) as file:
            file.seek(self.offset)
            for chunk in row_chunks(rows, row_elements):
                count = chunk.stop - chunk.start
                # A copy does not change with the file. From pinned memory it is copied to the device while the next
                # chunk is read.
                part = torch.empty((count, *row_shape), dtype=self.dtype, pin_memory=pinned)
                if part.numel():
                    read_into(file, part.view(torch.uint8), f"{self.key} in {self.file}")
                yield chunk.start, part.to(device, non_blocking=pinned)


@dataclass(frozen=True)
class FileHeader:
    """What a checkpoint file says about itself: its tensors by name, and the text fields of a safetensors header."""

    tensors: Mapping[str, RowSource]
    metadata: Mapping[str, str]


def read_header(file: Path) -> FileHeader:
    """Read the header of `file`, without its tensors.

    Raises:
        CheckpointError: `file` is absent, not a safetensors file, or not complete.
    """
    with open_file(file) as opened:
        size = file.stat().st_size
        length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
        if size < _LENGTH_BYTES or length > min(_LARGEST_HEADER, size - _LENGTH_BYTES):
            raise _incomplete(file, f"{size} bytes cannot hold its header")
        text = opened.read(length)
    start = _LENGTH_BYTES + length
    try:
        entries = json.loads(text)
        metadata = {str(name): str(value) for name, value in entries.pop(_METADATA_KEY, {}).items()}
        tensors = {key: _stored_tensor(file, key, entry, start) for key, entry in entries.items()}
        ends = [start + entry["data_offsets"][1] for entry in entries.values()]
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError) as error:
        raise _incomplete(file, f"its header cannot be read: {type(error).__name__}: {error}") from error
    if max(ends, default=start) != size:
        raise _incomplete(file, f"it has {size} bytes and its tensors end at {max(ends, default=start)}")
    return FileHeader(tensors, metadata)


def _stored_tensor(file: Path, key: str, entry: Any, start: int) -> StoredTensor:  # noqa: ANN401
    begin, end = entry["data_offsets"]
    shape = tuple(entry["shape"])
    if not all(type(number) is int and number >= 0 for number in (begin, end, *shape)):
        raise ValueError(f"{key} has the shape {list(shape)} at {begin} to {end}")
    dtype = DTYPES.get(entry["dtype"])
    if end < begin or (dtype is not None and end - begin != torch.Size(shape).numel() * dtype.itemsize):
        raise ValueError(f"{key} has {end - begin} bytes, which is not {list(shape)} of {entry['dtype']}")
    return StoredTensor(file, key, shape, str(entry["dtype"]), start + begin)


def _incomplete(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a complete safetensors file ({why}): download it again.")
