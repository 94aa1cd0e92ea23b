"""How long a device waits for layers that are streamed to it, and so what sets the pace; read when it is over."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from .copy_queue import CopyQueue

# So many passes are kept.
_PASSES = 16
# Of a pass, how long the device may wait for layers before they are said to set the pace.
_FEW = 0.05
COMPUTE, BUS, DISK = "compute", "bus", "disk"


@dataclass(frozen=True)
class _Stall:
    """A layer's call: when the device had nothing left to do but this layer, and when it had its weights."""

    layer: int
    source: str
    began: object
    ended: object


@dataclass(frozen=True)
class Stalls:
    """What the device waited for in some passes over the layers.

    Attributes:
        bus: of the time from the first streamed layer to the last, the part spent waiting for copies from RAM, 0 to 1.
        disk: the part spent waiting for layers from the disk.
    """

    bus: float
    disk: float

    @property
    def bound(self) -> str:
        """What sets the pace: "compute", "bus" or "disk"."""
        if self.bus + self.disk <= _FEW:
            return COMPUTE
        return DISK if self.disk > self.bus else BUS


class StallClock:
    """Notes points in the device's work around each wait, and reads their times when they are asked for.

    Args:
        queue: of the copies.
    """

    def __init__(self, queue: CopyQueue) -> None:
        self._queue = queue
        self._passes: deque[list[_Stall]] = deque(maxlen=_PASSES)

    def add(self, layer: int, source: str, began: object, ended: object) -> None:
        """Note a wait.

        Args:
            layer: by index; one that is not after the layer before begins a pass.
            source: BUS or DISK.
            began: the queue's time before the wait.
            ended: its time after the wait.
        """
        if not self._passes or layer <= self._passes[-1][-1].layer:
            self._passes.append([])
        self._passes[-1].append(_Stall(layer, source, began, ended))

    def read(self, passes: int) -> Stalls | None:
        """What the device waited for in the last `passes` passes; None as long as it is not through them."""
        stalls = [stall for one in list(self._passes)[-passes:] for stall in one]
        whole = self._queue.seconds_between(stalls[0].began, stalls[-1].ended) if stalls else None
        if not whole:
            return None
        waited = {BUS: 0.0, DISK: 0.0}
        for stall in stalls:
            waited[stall.source] += self._queue.seconds_between(stall.began, stall.ended) or 0.0
        return Stalls(waited[BUS] / whole, waited[DISK] / whole)
