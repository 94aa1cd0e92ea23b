"""Write a safetensors file tensor by tensor, without a second copy of all tensors.

`safetensors.torch.save_file` wants all tensors on the CPU at once. The format, from its documentation: 8 bytes with
the header's length (little-endian), the header as JSON padded with spaces, then the tensors without gaps.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .row_sources import RowSource
from .safetensors_reading import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor, on any device, and its name in the file."""

    name: str
    tensor: torch.Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers."""
        return self.tensor.dtype

    def parts(self) -> Iterator[torch.Tensor]:
        """The whole tensor."""
        yield self.tensor.detach()


@dataclass(frozen=True)
class PlannedRows:
    """A tensor that lies in another file, and its name in this one; it is copied some rows at a time."""

    name: str
    source: RowSource

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the tensor."""
        return self.source.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of its numbers; they are written as they are stored."""
        return self.source.dtype

    def parts(self) -> Iterator[torch.Tensor]:
        """The rows; raises CheckpointError when they cannot be read."""
        for _, rows in self.source.chunks(torch.device("cpu")):
            yield rows


Planned = PlannedTensor | PlannedRows


@dataclass(frozen=True)
class PlannedFile:
    """What is to be written to one file."""

    tensors: tuple[Planned, ...]
    metadata: Mapping[str, str]

    @property
    def nbytes(self) -> int:
        """Of the tensors."""
        return sum(map(bytes_of, self.tensors))


def bytes_of(planned: Planned) -> int:
    """Bytes of a tensor in the file."""
    return torch.Size(planned.shape).numel() * planned.dtype.itemsize


def write_tensors(
    path: Path,
    tensors: Sequence[Planned],
    metadata: Mapping[str, str],
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Write `tensors` and the text fields `metadata` to `path`, through a temporary file beside it.

    Each tensor is brought to the CPU by itself, those of another file some rows at a time. `on_tensor(name, nbytes)` is
    called after each.

    Raises:
        CheckpointError: a tensor of another file cannot be read.
        ValueError: two tensors have one name, or a dtype that safetensors does not know.
        OSError: the file cannot be written; what was at `path` is untouched.
    """
    # Widest first, so that every tensor lies at a multiple of its element size.
    ordered = sorted(tensors, key=lambda planned: (-planned.dtype.itemsize, planned.name))
    header = _header(ordered, metadata)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for planned in ordered:
                for part in planned.parts():
                    file.write(part.contiguous().reshape(-1).view(torch.uint8).cpu().numpy().data)
                if on_tensor is not None:
                    on_tensor(planned.name, bytes_of(planned))
        # mkstemp makes files for the owner only.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _header(tensors: Sequence[Planned], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for planned in tensors:
        dtype = _DTYPE_NAMES.get(planned.dtype)
        if dtype is None or planned.name in entries:
            raise ValueError(
                f"{planned.name} is {planned.dtype} and may be given once: allowed are "
                f"{', '.join(map(str, _DTYPE_NAMES))}, each name once."
            )
        end = offset + bytes_of(planned)
        entries[planned.name] = {"dtype": dtype, "shape": list(planned.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % _ALIGNMENT)
