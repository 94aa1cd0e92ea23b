"""Write a safetensors file tensor by tensor, without a second copy of all tensors.

`safetensors.torch.save_file` wants all tensors on the CPU at once. The format, from its documentation: 8 bytes with
the header's length (little-endian), the header as JSON padded with spaces, then the tensors without gaps.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from .safetensors_reading import DTYPES

_DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT = 8


@dataclass(frozen=True)
class PlannedTensor:
    """A tensor, on any device, and its name in the file."""

    name: str
    tensor: torch.Tensor

    @property
    def nbytes(self) -> int:
        """Bytes in the file."""
        return self.tensor.numel() * self.tensor.element_size()


def write_tensors(
    path: Path,
    tensors: Sequence[PlannedTensor],
    metadata: Mapping[str, str],
    on_tensor: Callable[[str, int], None] | None = None,
) -> None:
    """Write `tensors` and the text fields `metadata` to `path`, through a temporary file beside it.

    Tensors are copied to the CPU one at a time. `on_tensor(name, nbytes)` is called after each.

    Raises:
        ValueError: two tensors have the same name, or a dtype is not supported by safetensors.
        OSError: the file cannot be written; an existing file at `path` is unchanged.
    """
    # Widest dtype first, so that every tensor's offset is a multiple of its element size.
    ordered = sorted(tensors, key=lambda planned: (-planned.tensor.element_size(), planned.name))
    header = _header(ordered, metadata)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(len(header).to_bytes(8, "little"))
            file.write(header)
            for planned in ordered:
                flat = planned.tensor.detach().contiguous().reshape(-1).view(torch.uint8)
                file.write(flat.cpu().numpy().data)
                if on_tensor is not None:
                    on_tensor(planned.name, planned.nbytes)
        # mkstemp gives access to the owner only; apply the umask instead.
        umask = os.umask(0)
        os.umask(umask)
        Path(temporary).chmod(0o666 & ~umask)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _header(tensors: Sequence[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    entries: dict[str, object] = {"__metadata__": dict(metadata)}
    offset = 0
    for planned in tensors:
        dtype = _DTYPE_NAMES.get(planned.tensor.dtype)
        if dtype is None or planned.name in entries:
            raise ValueError(
                f"{planned.name} is {planned.tensor.dtype} and may be given once: allowed are "
                f"{', '.join(map(str, _DTYPE_NAMES))}, each name once."
            )
        end = offset + planned.nbytes
        entries[planned.name] = {"dtype": dtype, "shape": list(planned.tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(entries, separators=(",", ":")).encode("utf-8")
    return text + b" " * (-len(text) % _ALIGNMENT)
