"""Open a checkpoint file and read its bytes; what goes wrong is said with the file's name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .checkpoint_files import CheckpointError


def open_file(file: Path) -> Any:  # noqa: ANN401
    """`file`, opened unbuffered; raises CheckpointError when it cannot be."""
    try:
        return file.open("rb", buffering=0)
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read ({error}): download it again, or choose another file.") from error


def read_into(file: Any, target: torch.Tensor, place: str) -> None:  # noqa: ANN401
    """Fill the contiguous uint8 tensor `target` from `file`; `place` says in messages what is read.

    Raises CheckpointError when the file ends before `target` is full, or cannot be read.
    """
    rest = memoryview(target.reshape(-1).numpy().data)
    while rest:
        try:
            count = file.readinto(rest)
        except OSError as error:
            raise CheckpointError(f"{place} cannot be read ({error}): download the file again.") from error
        if not count:
            raise CheckpointError(f"{place} ends too early, its file has become shorter: download it again.")
        rest = rest[count:]
