"""What a checkpoint file holds, whichever format it is in: safetensors, or what `torch.save` wrote."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from .checkpoint_files import CheckpointError
from .file_kinds import FileKind, find_file_kind
from .row_sources import RowSource
from .safetensors_reading import FileHeader, read_header
from .torch_file_reading import read_legacy_torch_file, read_torch_file


def read_checkpoint(path: Path) -> FileHeader:
    """The tensors of `path` by name, and its text fields; no weight is read, and no code of the file runs.

    Nested dicts of a PyTorch file come out as dotted names: `generator_ema.blocks.0.weight`.

    Raises:
        CheckpointError: `path` is absent, damaged, something other than a checkpoint, or needs code to be read.
    """
    kind = find_file_kind(path)
    if kind is FileKind.TORCH_ZIP:
        return read_torch_file(path)
    if kind is FileKind.TORCH_LEGACY:
        return read_legacy_torch_file(path)
    return read_header(path)


def index_tensors(files: Iterable[Path]) -> dict[str, RowSource]:
    """Every tensor in `files` by key, from the headers only.

    Raises CheckpointError for a file that is truncated, corrupt or needs code, and for a key that two files hold.
    """
    tensors: dict[str, RowSource] = {}
    for file in files:
        for key, tensor in read_checkpoint(file).tensors.items():
            if key in tensors:
                raise CheckpointError(
                    f"{key} is in both {tensors[key].file.name} and {file.name} of {file.parent}: keep "
                    "one of the two files."
                )
            tensors[key] = tensor
    return tensors
