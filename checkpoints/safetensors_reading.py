"""Reads safetensors files by offset: the header, and the rows of a tensor. No file is mapped into memory.

`safetensors.safe_open` maps the whole file privately, which fails for a file larger than the machine's memory without
swap, and kills the process when a mapped file is truncated. The format (https://github.com/huggingface/safetensors):
8 bytes with the header's length, little-endian; the header, a JSON object; the tensors, row-major, without gaps.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.weight_filling import row_chunks
from .checkpoint_error import CheckpointError, shown
from .file_bytes import open_file, read_into
from .json_text import LARGEST_TEXT, parse_json
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
_MOST_TENSORS = 20_000
_MOST_AXES = 8
_DTYPE_NAME = re.compile(r"[A-Z0-9_]{1,20}")
_LONGEST_NAME = 500
# Of a tensor without elements, which no file size bounds; torch computes with 64 bits.
_MOST_ELEMENTS = 2**48
# The smallest numbers, of dtypes that are not read here, have 4 bits.
_MOST_PER_BYTE = 2


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
        try:
            size = os.fstat(opened.fileno()).st_size
            length = int.from_bytes(opened.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > size - _LENGTH_BYTES:
                raise _incomplete(file, f"{size} bytes cannot hold its header")
            if length > LARGEST_TEXT:
                raise _incomplete(file, f"its header has {length} bytes, and up to {LARGEST_TEXT} are read")
            text = opened.read(length)
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}): download it again.") from error
    if len(text) < length:
        raise _incomplete(file, "it has become shorter")
    entries = parse_json(text, f"the header of {file}")
    try:
        metadata = _metadata(entries.pop(_METADATA_KEY, {}))
        tensors = _stored_tensors(file, entries, _LENGTH_BYTES + length, size)
    except ValueError as error:
        raise _incomplete(file, f"its header cannot be read: {error}") from error
    return FileHeader(tensors, metadata)


def _metadata(fields: object) -> dict[str, str]:
    if not isinstance(fields, dict):
        raise ValueError(f"{_METADATA_KEY} is {shown(fields)}")
    return {name: value if isinstance(value, str) else str(value) for name, value in fields.items()}


def _stored_tensors(file: Path, entries: Mapping[str, Any], start: int, size: int) -> dict[str, StoredTensor]:
    """The tensors by name, which must fill the file from `start` to `size` one behind the other."""
    if len(entries) > _MOST_TENSORS:
        raise ValueError(f"it has {len(entries)} tensors, and up to {_MOST_TENSORS} are read")
    tensors, places = {}, []
    for key, entry in entries.items():
        if not key.isprintable() or not 0 < len(key) <= _LONGEST_NAME:
            raise ValueError(f"{shown(key)} is no name of a tensor")
        if not isinstance(entry, dict):
            raise ValueError(f"{key} is {shown(entry)}")
        begin, end = _whole_numbers(key, entry, "data_offsets", count=2)
        tensors[key] = _stored_tensor(file, key, entry, start + begin, end - begin)
        places.append((begin, end))
    reached = 0
    for begin, end in sorted(places):
        if begin != reached:
            raise ValueError(f"its tensors overlap or leave a gap at byte {begin}")
        reached = end
    if start + reached != size:
        raise ValueError(f"it has {size} bytes and its tensors end at {start + reached}")
    return tensors


def _stored_tensor(file: Path, key: str, entry: Mapping[str, Any], offset: int, nbytes: int) -> StoredTensor:
    shape = _whole_numbers(key, entry, "shape")
    name = entry.get("dtype")
    if not isinstance(name, str) or _DTYPE_NAME.fullmatch(name) is None:
        raise ValueError(f"{key} has the dtype {shown(name)}")
    if len(shape) > _MOST_AXES or math.prod(number or 1 for number in shape) > _MOST_ELEMENTS:
        raise ValueError(f"{key} has the shape {shown(list(shape))}")
    dtype, elements = DTYPES.get(name), math.prod(shape)
    fits = elements <= nbytes * _MOST_PER_BYTE if dtype is None else elements * dtype.itemsize == nbytes
    if not fits:
        raise ValueError(f"{key} has {nbytes} bytes, which is not {list(shape)} of {name}")
    return StoredTensor(file, key, shape, name, offset)


def _whole_numbers(key: str, entry: Mapping[str, Any], field: str, count: int | None = None) -> tuple[int, ...]:
    """The list of whole numbers from 0 in a tensor's `field`, of `count` numbers if it is given."""
    numbers = entry.get(field)
    if not isinstance(numbers, list) or not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{key} has the {field} {shown(numbers)}")
    if count is not None and (len(numbers) != count or numbers != sorted(numbers)):
        raise ValueError(f"{key} has the {field} {shown(numbers)}")
    return tuple(numbers)


def _incomplete(file: Path, why: str) -> CheckpointError:
    return CheckpointError(f"{file} is not a complete safetensors file ({why}): download it again.")
