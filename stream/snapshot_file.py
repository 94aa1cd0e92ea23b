"""Named tensors and one text in a file with a checksum over all of it.

The file is a safetensors file (https://github.com/huggingface/safetensors) whose header begins with the checksum:
SHA-256 of the whole file, with zeros in the checksum's own place. Any program that reads safetensors reads it. Nothing
in it is believed: what is read is no larger than the file, and each error is one sentence.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch

from ..checkpoints.checkpoint_error import first_line, shown
from ..checkpoints.json_text import load_object
from ..checkpoints.safetensors_reading import DTYPES
from .run_point import SnapshotFileError
from .snapshot_tree import check_room

_BEFORE_SUM = b'{"__metadata__":{"sha256":"'
_NO_SUM = b"0" * 64
_TEXT = "streamblocks"
_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
# Names of what is not whole yet.
PARTS = ".*.safetensors.part"
_LENGTH_BYTES, _ALIGNMENT = 8, 8
# A layout of 40 layers of keys takes 100 kB. A list of nothing in so many bytes becomes 45 MB of Python's objects.
LARGEST_HEADER = 2_000_000
_MOST_TENSORS, _MOST_AXES, _MOST_ELEMENTS = 20_000, 16, 2**48
_PIECE = 1 << 20
# Bytes that wait for the disk at a time: more would hold up whoever writes to it meanwhile, and the last call.
_WAITING = 1 << 28


@dataclass(frozen=True)
class _Entry:
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def write_snapshot_file(
    path: Path, tensors: Mapping[str, torch.Tensor], text: str, check: Callable[[], None] = lambda: None
) -> None:
    """Write `path`, beside it first; on return it is on the disk whole, and before that it is what it was.

    `check` is called at each piece that is written; what it raises ends the writing.

    Raises:
        ValueError: a tensor has a dtype that safetensors does not know, or the text is too long.
        OSError: it could not be written.
    """
    # Widest first, so that each tensor lies at a multiple of its element's size.
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0]))
    header = _header(ordered, text)
    digest = hashlib.sha256()
    part = path.with_name(f".{path.name}.part")
    try:
        with part.open("wb") as file:
            waiting = 0
            for piece in _pieces(header, ordered):
                check()
                digest.update(piece)
                file.write(piece)
                waiting += len(piece)
                if waiting >= _WAITING:
                    file.flush()
                    os.fsync(file.fileno())
                    waiting = 0
            file.seek(_LENGTH_BYTES + len(_BEFORE_SUM))
            file.write(digest.hexdigest().encode())
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)
        sync_folder(path.parent)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` outlast a power failure, where the system has a way to."""
    if os.name == "nt":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_text(path: Path) -> str:
    """The text of a snapshot file, by its header alone: quick, and not checked against the checksum.

    Raises:
        SnapshotFileError: `path` is no such file.
    """
    with _opened(path) as file:
        return _read_header(path, file)[1]


def read_snapshot_file(path: Path) -> tuple[dict[str, torch.Tensor], str]:
    """The tensors and the text, if the checksum is right.

    Raises:
        SnapshotFileError: `path` is no such file, or not whole.
        MemoryError: there is too little RAM for the tensors.
    """
    with _opened(path) as file:
        header, text, entries = _read_header(path, file)
        check_room(sum(entry.end - entry.begin for entry in entries))
        digest = hashlib.sha256(len(header).to_bytes(_LENGTH_BYTES, "little"))
        place = len(_BEFORE_SUM)
        claimed = header[place : place + len(_NO_SUM)]
        digest.update(header[:place] + _NO_SUM + header[place + len(_NO_SUM) :])
        tensors = {entry.name: _read_tensor(path, file, entry, digest) for entry in entries}
    if digest.hexdigest().encode() != claimed:
        raise SnapshotFileError(f"{path} is damaged: its checksum is another than that of its content.")
    return tensors, text


def _header(tensors: list[tuple[str, torch.Tensor]], text: str) -> bytes:
    entries: dict[str, Any] = {}
    offset = 0
    for name, tensor in tensors:
        if tensor.dtype not in _DTYPE_NAMES:
            raise ValueError(f"{name} is {tensor.dtype}, which a safetensors file cannot hold.")
        end = offset + tensor.nbytes
        entries[name] = {
            "dtype": _DTYPE_NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    rest = json.dumps(entries, separators=(",", ":"))[1:].encode()
    comma = b"," if entries else b""
    header = b"".join(
        [_BEFORE_SUM, _NO_SUM, b'","', _TEXT.encode(), b'":', json.dumps(text).encode(), b"}", comma, rest]
    )
    header += b" " * (-len(header) % _ALIGNMENT)
    if len(header) > LARGEST_HEADER:
        raise ValueError(
            f"what describes the stream takes {len(header)} bytes, and a snapshot has {LARGEST_HEADER} for it."
        )
    return header


def _pieces(header: bytes, tensors: list[tuple[str, torch.Tensor]]) -> Iterator[bytes | memoryview]:
    """The content of a file, some at a time."""
    yield len(header).to_bytes(_LENGTH_BYTES, "little")
    yield header
    for _, tensor in tensors:
        whole = tensor.contiguous().reshape(-1).view(torch.uint8)
        yield from (memoryview(piece.numpy().data) for piece in whole.split(_PIECE))


def _opened(path: Path) -> Any:  # noqa: ANN401
    try:
        # A pipe or a device would never end, or never answer.
        if not stat.S_ISREG(path.stat().st_mode):
            raise SnapshotFileError(f"{path} is no file: choose a saved stream.")
        return path.open("rb", buffering=0)
    except OSError as error:
        raise SnapshotFileError(f"{path} cannot be read ({error}): choose another saved stream.") from error


def _read_header(path: Path, file: BinaryIO) -> tuple[bytes, str, list[_Entry]]:
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(_read(path, file, min(_LENGTH_BYTES, size)), "little")
    if size < _LENGTH_BYTES or not length <= min(LARGEST_HEADER, size - _LENGTH_BYTES):
        raise SnapshotFileError(f"{path} is no saved stream, or damaged: its {size} bytes do not hold its header.")
    header = _read(path, file, length)
    if not header.startswith(_BEFORE_SUM):
        raise SnapshotFileError(f"{path} is no saved stream, or damaged: its header does not begin with a checksum.")
    try:
        described = load_object(header)
        text = described.pop("__metadata__")[_TEXT]
        if not isinstance(text, str) or len(described) > _MOST_TENSORS:
            raise TypeError("its description")
        entries = [_entry(name, entry) for name, entry in described.items()]
        ends = [0, *(entry.end for entry in entries)]
        if [entry.begin for entry in entries] != ends[:-1] or _LENGTH_BYTES + length + ends[-1] != size:
            raise ValueError("its tensors do not follow each other to its end")
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError) as error:
        raise SnapshotFileError(f"{path} is damaged: its header cannot be read ({first_line(error)}).") from error
    return header, text, entries


def _entry(name: str, entry: Any) -> _Entry:  # noqa: ANN401
    shape, (begin, end) = entry["shape"], entry["data_offsets"]
    if len(shape) > _MOST_AXES or not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
        raise TypeError(f"the sizes of {shown(name)}")
    dtype = DTYPES[entry["dtype"]]
    # Of a tensor without elements, no file's size bounds the others, and torch computes with 64 bits.
    if math.prod(number or 1 for number in shape) > _MOST_ELEMENTS or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"the sizes of {shown(name)}")
    return _Entry(name, dtype, tuple(shape), begin, end)


def _read_tensor(path: Path, file: Any, entry: _Entry, digest: Any) -> torch.Tensor:  # noqa: ANN401
    made = torch.empty(entry.shape, dtype=entry.dtype)
    rest = memoryview(made.reshape(-1).view(torch.uint8).numpy().data)
    while rest:
        count = file.readinto(rest[:_PIECE])
        if not count:
            raise SnapshotFileError(f"{path} is damaged: it ends too early.")
        digest.update(rest[:count])
        rest = rest[count:]
    return made


def _read(path: Path, file: BinaryIO, count: int) -> bytes:
    read = b""
    while len(read) < count:
        piece = file.read(count - len(read))
        if not piece:
            raise SnapshotFileError(f"{path} is damaged: it ends too early.")
        read += piece
    return read
