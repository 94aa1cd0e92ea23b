"""Copies from the host to the device beside the computing, and memory on the host that they are fast from."""

from __future__ import annotations

import time
import weakref
from typing import Protocol

import torch


class CopyQueue(Protocol):
    """Copies blocks to the device, each when what reads its target is done."""

    def mark(self) -> object:
        """A point in the device's work: everything that is queued so far by this thread."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object) -> object:
        """Copy once the device has come to the point `after`; returns a ticket. Any thread may call it."""

    def wait(self, ticket: object) -> None:
        """Let the device wait, before it goes on computing, until that copy is done; the host goes on."""

    def finish(self, ticket: object) -> None:
        """Let the host wait until that copy is done."""

    def now(self) -> object:
        """When the device comes to this point of its work; for `seconds_between`."""

    def seconds_between(self, earlier: object, later: object) -> float | None:
        """Seconds from one such time to another; None as long as the device has not come there."""


class CudaCopyQueue:
    """A CUDA stream of its own.

    Args:
        device: a CUDA device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def mark(self) -> object:
        """See `CopyQueue`."""
        return torch.cuda.current_stream(self._device).record_event()

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object) -> object:
        """See `CopyQueue`; from pageable memory the host waits for the copy."""
        if isinstance(after, torch.cuda.Event):
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, ticket: object) -> None:
        """See `CopyQueue`."""
        if isinstance(ticket, torch.cuda.Event):
            torch.cuda.current_stream(self._device).wait_event(ticket)

    def finish(self, ticket: object) -> None:
        """See `CopyQueue`."""
        if isinstance(ticket, torch.cuda.Event):
            ticket.synchronize()

    def now(self) -> object:
        """See `CopyQueue`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event

    def seconds_between(self, earlier: object, later: object) -> float | None:
        """See `CopyQueue`."""
        assert isinstance(earlier, torch.cuda.Event) and isinstance(later, torch.cuda.Event)
        return earlier.elapsed_time(later) / 1e3 if later.query() else None


class DirectCopyQueue:
    """Copies at once: for devices without queues, such as the CPU."""

    def mark(self) -> object:
        """Nothing: what was called is done."""
        return None

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: object) -> object:
        """See `CopyQueue`."""
        target.copy_(source)
        return None

    def wait(self, ticket: object) -> None:
        """Do nothing."""

    def finish(self, ticket: object) -> None:
        """Do nothing."""

    def now(self) -> object:
        """See `CopyQueue`."""
        return time.perf_counter()

    def seconds_between(self, earlier: object, later: object) -> float | None:
        """See `CopyQueue`."""
        assert isinstance(earlier, float) and isinstance(later, float)
        return later - earlier


def make_copy_queue(device: torch.device) -> CopyQueue:
    """The queue for a device."""
    return CudaCopyQueue(device) if device.type == "cuda" else DirectCopyQueue()


class HostBlock:
    """Bytes in ordinary memory, pinned where that is wanted and possible.

    torch's own pinned memory is handed out in powers of two: a layer of 336 MiB would take 512. Ordinary memory that
    is registered afterwards takes what it holds.

    Attributes:
        data: uint8 [size].
        pinned: whether the device copies from it by itself.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        self.data = torch.empty(size, dtype=torch.uint8)
        self.pinned = pin and _register(self.data)
        if self.pinned:
            # The memory must not be given back to the system while it is registered.
            self._unregister = weakref.finalize(self, _unregister, self.data)
            self._unregister.atexit = False

    def release(self) -> None:
        """Unpin; the memory goes when nothing refers to `data` any more."""
        if self.pinned:
            self._unregister()
            self.pinned = False


def _register(data: torch.Tensor) -> bool:
    code = torch.cuda.cudart().cudaHostRegister(data.data_ptr(), data.numel(), 0)
    return int(code) == 0


def _unregister(data: torch.Tensor) -> None:
    torch.cuda.cudart().cudaHostUnregister(data.data_ptr())
