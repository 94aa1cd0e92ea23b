"""Bytes on a disk for which there is no RAM: written once, read many times, gone with the process."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Iterable
from pathlib import Path

import psutil
import torch

from ..memory.byte_text import format_gb
from .full_disk import explaining_full_disk

# Folders there lie in RAM, or in swap.
_RAM_FILE_SYSTEMS = frozenset({"tmpfs", "ramfs"})
# Linux transfers a little less than 2 GiB in one call.
_STEP = 2**30


class DiskBlock:
    """Bytes in a file without a name, which the system deletes when it is closed, however the process ends.

    Args:
        data: uint8 [size], in ordinary memory; written here.
        folder: of the file, on a disk.

    Attributes:
        size: bytes.

    Raises:
        OSError: the disk is full, in one sentence.
    """

    def __init__(self, data: torch.Tensor, folder: Path) -> None:
        self.size = data.numel()
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        with explaining_full_disk(folder, lambda: f"a layer of {format_gb(self.size)} does not fit there"):
            # Not buffered: layers go straight from the memory they are in.
            self._file = tempfile.TemporaryFile(prefix="streamblocks-", dir=folder, buffering=0)  # noqa: SIM115
            try:
                rest = data.numpy().data
                while rest:
                    rest = rest[self._file.write(rest[:_STEP]) :]
            except BaseException:
                self._file.close()
                raise

    def read_into(self, target: torch.Tensor) -> None:
        """Read all bytes into `target`, uint8 [size], in ordinary memory; other threads run meanwhile.

        Raises:
            OSError: the disk fails, in one sentence.
        """
        try:
            self._file.seek(0)
            rest = target.numpy().data
            while rest:
                count = self._file.readinto(rest[:_STEP])
                if not count:
                    raise OSError(errno.EIO, f"its last {len(rest)} bytes are gone")
                rest = rest[count:]
        except OSError as error:
            message = (
                f"a layer kept in a temporary file in {self._folder} cannot be read ({error.strerror}): check the disk "
                "and run again"
            )
            raise OSError(error.errno, message) from error

    def mapped(self) -> torch.Tensor:
        """The bytes as uint8 [size], read from the file where they are looked at, without memory of their own."""
        return torch.frombuffer(mmap.mmap(self._file.fileno(), self.size), dtype=torch.uint8)

    def forget_cached(self) -> None:
        """Have the next read come from the disk itself; only where there is `os.posix_fadvise`."""
        os.fsync(self._file.fileno())
        os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    def release(self) -> None:
        """Delete the file, once nothing refers to it as mapped any more."""
        self._file.close()


def folder_on_disk(folders: Iterable[Path]) -> Path | None:
    """The first of `folders` that does not lie in RAM; None where all do."""
    return next((folder for folder in folders if _file_system(folder) not in _RAM_FILE_SYSTEMS), None)


def usual_folders() -> tuple[Path, ...]:
    """Where temporary files lie on this system (TMPDIR), and where large ones do on Linux, if /tmp is RAM."""
    return tuple(folder for folder in (Path(tempfile.gettempdir()), Path("/var/tmp")) if folder.is_dir())


def free_bytes(folder: Path) -> int:
    """Bytes that are free on the disk of `folder`, which need not exist yet."""
    return int(psutil.disk_usage(str(_existing(folder))).free)


def _file_system(folder: Path) -> str:
    """The kind of file system that `folder` lies on; empty where the system does not say."""
    path = _existing(folder).resolve()
    try:
        mounts = {Path(part.mountpoint): part.fstype for part in psutil.disk_partitions(all=True)}
    except OSError:
        # A container may hide them.
        return ""
    return next((mounts[place] for place in (path, *path.parents) if place in mounts), "")


def _existing(folder: Path) -> Path:
    return next(place for place in (folder, *folder.absolute().parents) if place.exists())
