"""Reads streamed layers from the disk ahead of their use, in a thread of its own."""

from __future__ import annotations

import threading
import time
import weakref
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch

from .copy_queue import CopyQueue, HostBlock
from .scratch_disk import DiskBlock

# One is read into while the other is copied to the device.
STAGES = 2

# Queues the copy of a layer's bytes, uint8 [size], to its slot; returns the ticket.
CopyLayer = Callable[[torch.Tensor], object]


@dataclass
class ReadCount:
    """What was read from a disk.

    Attributes:
        bytes: so many.
        seconds: that it took, while the thread did nothing else.
    """

    bytes: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float:
        """Bytes a second; 0 before anything was read."""
        return self.bytes / self.seconds if self.seconds else 0.0


@dataclass
class _Stage:
    """Memory that layers pass through on their way from the disk to the device.

    Attributes:
        block: as large as the largest layer.
        holds: the layer that is or will be in it; None when it is free.
        ready: whether that layer has been read.
        leaving: ticket of the last copy from it.
    """

    block: HostBlock
    holds: int | None = None
    ready: bool = False
    leaving: object = None


@dataclass
class _Reading:
    """What the thread and those who ask it share; it does not refer to the reader, which stops it when it goes.

    Attributes:
        blocks: by layer.
        order: of the layers: one is read while no other is asked for because it comes next, the first after the last.
        upcoming: the next one, as a place in `order`.
        wanted: layers that were asked for and have not been read.
        failed: what ended the thread.
    """

    queue: CopyQueue
    count: ReadCount
    blocks: Mapping[int, DiskBlock]
    stages: tuple[_Stage, ...]
    order: tuple[int, ...]
    upcoming: int = 0
    wanted: dict[int, tuple[CopyLayer, Future[object]]] = field(default_factory=dict)
    failed: BaseException | None = None
    stopped: bool = False
    changed: threading.Condition = field(default_factory=threading.Condition)

    def run(self) -> None:
        """Until it is stopped or the disk fails."""
        try:
            # Slots may be cut in inference mode by those who ask.
            with torch.inference_mode():
                while (chosen := self._wait_for_work()) is not None:
                    self._read(*chosen)
        except BaseException as error:
            with self.changed:
                self.failed = error
                for _, promised in self.wanted.values():
                    promised.set_exception(error)
                self.wanted.clear()

    def hand_over(self, index: int) -> None:
        """Queue the copy of a layer that was read and asked for, if it is both; `changed` is held."""
        stage = next((stage for stage in self.stages if stage.holds == index and stage.ready), None)
        if stage is None or index not in self.wanted:
            return
        copy, promised = self.wanted.pop(index)
        stage.leaving = copy(stage.block.data[: self.blocks[index].size])
        stage.holds, stage.ready = None, False
        promised.set_result(stage.leaving)
        self.changed.notify_all()

    def _wait_for_work(self) -> tuple[_Stage, int] | None:
        with self.changed:
            while not self.stopped:
                if (chosen := self._choose()) is not None:
                    stage, index = chosen
                    stage.holds, stage.ready = index, False
                    self.upcoming = (self.order.index(index) + 1) % len(self.order)
                    return stage, index
                self.changed.wait()
        return None

    def _choose(self) -> tuple[_Stage, int] | None:
        """What to read next, and into which stage: a layer that is waited for, or else the one that comes next."""
        held = {stage.holds for stage in self.stages}
        free = next((stage for stage in self.stages if stage.holds is None), None)
        missing = next((index for index in self.wanted if index not in held), None)
        if missing is not None:
            # None that is held is waited for: those were handed over when they had been read.
            return free or self.stages[0], missing
        index = self.order[self.upcoming]
        return (free, index) if free is not None and index not in held else None

    def _read(self, stage: _Stage, index: int) -> None:
        self.queue.finish(stage.leaving)
        block = self.blocks[index]
        began = time.perf_counter()
        block.read_into(stage.block.data[: block.size])
        with self.changed:
            self.count.seconds += time.perf_counter() - began
            self.count.bytes += block.size
            stage.ready = True
            self.hand_over(index)


class ReadAhead:
    """Reads layers from the disk, each a little before it is asked for.

    Args:
        blocks: by layer; asked for in the order of these numbers, the first one after the last. Any other order
            costs reading in vain.
        queue: of the copies; both threads use it.
        count: what is read is added to it.
        pin: whether the memory that is read into is pinned.
    """

    def __init__(self, blocks: Mapping[int, DiskBlock], queue: CopyQueue, count: ReadCount, *, pin: bool) -> None:
        size = max(block.size for block in blocks.values())
        stages = tuple(_Stage(HostBlock(size, pin=pin)) for _ in range(min(STAGES, len(blocks))))
        self._reading = _Reading(queue, count, dict(blocks), stages, tuple(sorted(blocks)))
        thread = threading.Thread(target=self._reading.run, name="streamblocks disk reader", daemon=True)
        # When the reader goes, or the process ends: a thread that runs into the interpreter's end can crash it.
        self._stop = weakref.finalize(self, _stop, self._reading, thread)
        thread.start()

    @property
    def host_bytes(self) -> int:
        """Bytes of memory that layers are read into."""
        return sum(stage.block.data.numel() for stage in self._reading.stages)

    def request(self, index: int, copy: CopyLayer) -> Future[object]:
        """Have a layer copied as soon as it is read, by this thread or the reader's.

        Args:
            index: of the layer; not asked for already.
            copy: called once, with its bytes.

        Returns:
            The copy's ticket; `result()` waits for the disk, and raises OSError where the disk failed.
        """
        promised: Future[object] = Future()
        reading = self._reading
        with reading.changed:
            if reading.failed is not None:
                promised.set_exception(reading.failed)
                return promised
            reading.wanted[index] = (copy, promised)
            reading.hand_over(index)
            reading.changed.notify_all()
        return promised

    def close(self) -> None:
        """Stop reading, and give the memory back; what was asked for and not read is not copied."""
        self._stop()


def _stop(reading: _Reading, thread: threading.Thread) -> None:
    with reading.changed:
        reading.stopped = True
        reading.changed.notify_all()
    if thread is not threading.current_thread():
        # It is where a garbage collection comes upon the reader while the thread reads.
        thread.join()
    for stage in reading.stages:
        reading.queue.finish(stage.leaving)
        stage.block.release()
