"""How fast the bus to a device and a disk are, measured in a moment, before anything is streamed."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from .copy_queue import CudaCopyQueue, HostBlock
from .scratch_disk import DiskBlock

_BYTES = 64 * 2**20


def measure_bus_rate(device: torch.device) -> float:
    """Bytes a second from pinned memory to a CUDA device, of which 64 MiB are taken for it; 0 for other devices."""
    if device.type != "cuda":
        return 0.0
    queue, source = CudaCopyQueue(device), HostBlock(_BYTES, pin=True)
    target = torch.empty(_BYTES, dtype=torch.uint8, device=device)
    seconds = []
    # The first one wakes the bus.
    for _ in range(2):
        began = time.perf_counter()
        queue.finish(queue.copy(target, source.data, queue.mark()))
        seconds.append(time.perf_counter() - began)
    source.release()
    return _BYTES / min(seconds)


def measure_disk_rate(folder: Path) -> float:
    """Bytes a second at which 64 MiB are read from a file in `folder`; 0 where only the system's cache would be read.

    Raises:
        OSError: the disk is full.
    """
    if not hasattr(os, "posix_fadvise"):
        return 0.0
    data = torch.empty(_BYTES, dtype=torch.uint8).random_()
    block = DiskBlock(data, folder)
    block.forget_cached()
    began = time.perf_counter()
    block.read_into(data)
    seconds = time.perf_counter() - began
    block.release()
    return _BYTES / seconds
