"""Open a file and read its bytes; what goes wrong is said with the file's name.

Every file of a model is opened here. What is no regular file, such as a pipe or a device, is refused before it is
opened: reading it could wait for ever, or never end.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import torch

from .checkpoint_error import CheckpointError

# Opening a pipe that takes a file's place meanwhile must not wait for its other end.
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)


def open_file(file: Path) -> Any:  # noqa: ANN401
    """`file`, opened unbuffered; raises CheckpointError when it cannot be, or is no regular file."""
    try:
        _check_regular(file, file.stat())
        opened = open(file, "rb", buffering=0, opener=_open_at_once)  # noqa: SIM115
    except (OSError, ValueError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file} cannot be read ({error}): download it again, or choose another file.") from error
    try:
        _check_regular(file, os.fstat(opened.fileno()))
    except CheckpointError:
        opened.close()
        raise
    return opened


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | _NO_WAIT)


def _check_regular(file: Path, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        what = "a folder" if stat.S_ISDIR(facts.st_mode) else "a device, a pipe or a socket"
        raise CheckpointError(f"{file} is {what} and no file: put the file itself there, or choose another.")


def read_at_most(file: Path, limit: int) -> bytes:
    """All bytes of a small file; raises CheckpointError for one of more than `limit` bytes, and what `open_file` does.

    No more than that is ever read, however the file grows.
    """
    with open_file(file) as opened:
        try:
            size = os.fstat(opened.fileno()).st_size
            content = b"" if size > limit else bytes(opened.read(limit + 1))
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read ({error}): download it again.") from error
    if max(size, len(content)) > limit:
        raise CheckpointError(
            f"{file} has {max(size, len(content))} bytes, and files of its kind have up to {limit}: download it again."
        )
    return content


def check_small_files(folder: Path, limit: int) -> None:
    """Raise CheckpointError when anything in `folder` is no regular file, or has more than `limit` bytes.

    For libraries that open files of a folder by themselves; its sub-folders are left alone.
    """
    for file in sorted(folder.iterdir()):
        if file.is_dir():
            continue
        with open_file(file) as opened:
            size = os.fstat(opened.fileno()).st_size
        if size > limit:
            raise CheckpointError(
                f"{file} has {size} bytes, and files of its kind have up to {limit}: download it again."
            )


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
