"""Reads PyTorch's files (`.pt`, `.pth`, `.bin`, `.ckpt`) without running code of theirs, and by offset.

Only `torch.load(weights_only=True)` ever opens them: it makes tensors and plain containers, and refuses everything
else. Under `FakeTensorMode` it reads the structure only and says where in the file each storage lies
(https://docs.pytorch.org/docs/stable/notes/serialization.html); rows are then read like those of a safetensors file.
So nothing is mapped: a private map of a file larger than the machine's memory fails, and a mapped file that is
truncated meanwhile kills the process. A PyTorch that does not say where storages lie maps the file (`mmap=True`).
"""

from __future__ import annotations

import io
import os
import pickle
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..ops.weight_filling import row_chunks
from .checkpoint_error import CheckpointError, first_line, shown, shown_word
from .file_bytes import open_file, read_into
from .row_sources import RowChunk, RowSource
from .safetensors_reading import DTYPES, FileHeader, StoredTensor
from .torch_structure import check_legacy_structure, check_zip_structure

# Files from before PyTorch 1.6 hold their storages behind one another and can only be read whole.
LARGEST_LEGACY_FILE = 2**30
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_REFUSED_GLOBAL = re.compile(r"GLOBAL (\S+) was not an allowed global|Trying to (?:load|call) .*?GLOBAL (\S+)")
_DEEPEST = 16
_MOST_ENTRIES = 100_000
_LONGEST_NAME = 500


@dataclass(frozen=True)
class StridedTensor:
    """A tensor of a PyTorch file whose rows do not lie one behind the other, such as a transposed one; a `RowSource`.

    Attributes:
        file: where it is stored.
        key: its dotted name in the file.
        shape: of the tensor.
        dtype: of its numbers.
        strides: elements from one index to the next, for each axis.
        offset: bytes of its first element from the beginning of the file.
    """

    file: Path
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    strides: tuple[int, ...]
    offset: int

    def chunks(self, device: torch.device) -> Iterator[RowChunk]:
        """All rows; those whose elements lie scattered over the whole tensor are read with it, once."""
        with open_file(self.file) as file:
            if self.strides[0] < max(self.strides):
                whole = self._read(file, 0, self.shape[0])
                for rows in self._row_chunks():
                    yield rows.start, whole[rows].contiguous().to(device)
                return
            for rows in self._row_chunks():
                yield rows.start, self._read(file, rows.start, rows.stop - rows.start).contiguous().to(device)

    def _row_chunks(self) -> Iterator[slice]:
        return row_chunks(self.shape[0], torch.Size(self.shape[1:]).numel())

    def _read(self, file: Any, first: int, count: int) -> torch.Tensor:  # noqa: ANN401
        """`count` rows, as a view of all that lies between their first and last element."""
        shape = (count, *self.shape[1:])
        held = torch.empty(_span(shape, self.strides), dtype=self.dtype)
        file.seek(self.offset + first * self.strides[0] * self.dtype.itemsize)
        read_into(file, held.view(torch.uint8), f"{self.key} in {self.file}")
        return held.as_strided(shape, self.strides)


@dataclass(frozen=True, eq=False)
class HeldTensor:
    """A tensor in memory, or in a map of its file; a `RowSource`.

    Attributes:
        file: where it came from.
        key: its dotted name there.
        tensor: on the CPU.
    """

    file: Path
    key: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.tensor.dtype

    def chunks(self, device: torch.device) -> Iterator[RowChunk]:
        """Copies of the rows."""
        rows = self.tensor if self.tensor.ndim else self.tensor.view(1)
        for part in row_chunks(rows.shape[0], torch.Size(rows.shape[1:]).numel()):
            yield part.start, rows[part].to(device, copy=True).contiguous()


def read_torch_file(path: Path) -> FileHeader:
    """Every tensor of a file that `torch.save` wrote, by its dotted name; nothing is read but the structure.

    Raises:
        CheckpointError: the file is not complete, holds anything but tensors and plain containers, holds no tensor, or
            is compressed.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    size = check_zip_structure(path)
    found = _flatten(path, _load(path, FakeTensorMode(), mmap=False))
    if all(_storage_offset(tensor) is not None for tensor in found.values()):
        return FileHeader({key: _stored(path, key, tensor, size) for key, tensor in found.items()}, {})
    return _held(path, _load(path, nullcontext(), mmap=True))


def read_legacy_torch_file(path: Path) -> FileHeader:
    """The same of a file from before PyTorch 1.6, which is read whole; raises CheckpointError for a large one too."""
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
    if size > LARGEST_LEGACY_FILE:
        raise CheckpointError(
            f"{path} is in PyTorch's format from before 1.6 and has {size / 1e9:.1f} GB, up to "
            f"{LARGEST_LEGACY_FILE / 1e9:.1f} GB are read whole: save it again with a newer PyTorch."
        )
    check_legacy_structure(path)
    return _held(path, _load(path, nullcontext(), mmap=False))


def _load(path: Path, mode: AbstractContextManager[Any], *, mmap: bool) -> object:
    try:
        if mmap:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        # Opened here: what torch.load does with a path depends on its suffix, which may be wrong.
        with io.BufferedReader(open_file(path)) as file, mode:
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise _refused(path, error) from None
    except CheckpointError:
        raise
    except MemoryError as error:
        raise CheckpointError(f"{path} does not fit into memory: free some, or convert the file elsewhere.") from error
    except Exception as error:
        # A damaged pickle raises whatever its opcodes run into.
        if "TorchScript" in str(error):
            raise CheckpointError(
                f"{path} is a TorchScript archive, which is code and not weights: give the model as .safetensors."
            ) from None
        raise CheckpointError(
            f"{path} is not a complete PyTorch file ({first_line(error)}): download it again."
        ) from error


def _refused(path: Path, error: Exception) -> CheckpointError:
    found = _REFUSED_GLOBAL.search(str(error))
    named = next((name for name in found.groups() if name), None) if found else None
    if named is None:
        return CheckpointError(
            f"{path} is not a PyTorch file of tensors and plain containers, so it is not opened: download it again, or "
            "give a .safetensors file of the model."
        )
    return CheckpointError(
        f"{path} asks for {shown_word(named)} when it is opened, which could run code, so it is not opened: give a "
        ".safetensors file of the model, or a .pt that holds nothing but tensors."
    )


def _flatten(path: Path, content: object) -> dict[str, torch.Tensor]:
    """Every tensor in nested dicts, by its dotted name; what else is in them is left out."""
    tensors: dict[str, torch.Tensor] = {}
    pending: list[tuple[str, object, int]] = [("", content, 0)]
    visited = 0
    while pending:
        name, value, depth = pending.pop()
        visited += 1
        # Containers may hold one another many times over, and so stand for more entries than any memory holds.
        if visited > _MOST_ENTRIES or len(name) > _LONGEST_NAME or len(pending) > _MOST_ENTRIES:
            raise CheckpointError(f"{path} has more entries, or longer names, than any checkpoint: download it again.")
        if isinstance(value, torch.Tensor):
            if name in tensors:
                raise CheckpointError(f"{path} holds {name} twice: give a file with one transformer.")
            tensors[name] = value.detach()
        elif isinstance(value, Mapping) and depth < _DEEPEST:
            pending += [
                (f"{name}.{_word(key)}" if name else _word(key), inner, depth + 1) for key, inner in value.items()
            ]
    if not tensors or "" in tensors:
        raise CheckpointError(f"{path} holds no dict of tensors: give a checkpoint with a model's weights.")
    return dict(sorted(tensors.items()))


def _word(key: object) -> str:
    """A key as a part of a name; those that no name has are shortened and made printable."""
    return key if isinstance(key, str) and key.isprintable() else shown(key)


def _held(path: Path, content: object) -> FileHeader:
    return FileHeader({key: HeldTensor(path, key, t) for key, t in _flatten(path, content).items()}, {})


def _storage_offset(tensor: torch.Tensor) -> int | None:
    """Where the tensor's storage begins in the file; None from a PyTorch that does not say so."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return 0
    return getattr(tensor.untyped_storage(), "_checkpoint_offset", None) if tensor.numel() else 0


def _stored(path: Path, key: str, tensor: torch.Tensor, file_size: int) -> RowSource:
    """Where the rows of `tensor`, which has no values, lie in `path`."""
    shape = tuple(tensor.shape)
    name = _DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
    if tensor.layout != torch.strided or tensor.is_quantized:
        return StoredTensor(path, key, shape, f"{name}, {tensor.layout}", 0)
    begin = _storage_offset(tensor) or 0
    offset = begin + int(tensor.storage_offset()) * tensor.element_size()
    strides = tuple(tensor.stride())
    end = offset + _span(shape, strides) * tensor.element_size()
    if end > min(begin + tensor.untyped_storage().nbytes(), file_size) and tensor.numel():
        raise CheckpointError(f"{path} is not a complete PyTorch file ({key} ends behind its end): download it again.")
    if tensor.is_contiguous() or not tensor.numel():
        return StoredTensor(path, key, shape, name, offset)
    return StridedTensor(path, key, shape, tensor.dtype, strides, offset)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Elements from the first to the last of a tensor, both counted."""
    if not torch.Size(shape).numel():
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
