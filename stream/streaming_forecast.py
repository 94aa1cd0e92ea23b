"""What a plan says before the stream runs: where layers lie, and how long moving them takes at the least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..memory.byte_text import format_gb
from .layer_plan import LayerPlan
from .layer_slots import copied_each_pass


@dataclass(frozen=True)
class Rates:
    """Bytes a second, 0 where they are not known.

    Attributes:
        bus: from RAM to the device.
        disk: from the disk to RAM.
    """

    bus: float = 0.0
    disk: float = 0.0


@dataclass(frozen=True)
class Pace:
    """How often a component's layers are gone through.

    Attributes:
        passes: a `unit`.
        pictures: that a `unit` makes; 0 for none.
        unit: "block" or "prompt".
        savings: what else was chosen because layers are streamed, as clauses.
    """

    passes: int
    pictures: int = 0
    unit: str = "block"
    savings: tuple[str, ...] = ()


def forecast(plan: LayerPlan, layer_bytes: Sequence[int], pace: Pace, rates: Rates) -> str:
    """A clause with the least that moving the layers takes: all over the bus, some from the disk, side by side.

    Computing is not in it, which runs meanwhile. Empty when nothing moves or no rate is known.
    """
    moved = copied_each_pass(plan.streamed)
    copied = pace.passes * sum(layer_bytes[index] for index in moved)
    read = pace.passes * sum(layer_bytes[index] for index in moved if index in plan.on_disk)
    ways = [("the copies alone take", copied, rates.bus), ("reading the disk alone takes", read, rates.disk)]
    known = [(size / rate, what, size, rate) for what, size, rate in ways if size and rate]
    if not known:
        return ""
    seconds, what, size, rate = max(known)
    text = f"{what} at least {_short(seconds)} s a {pace.unit} ({format_gb(size)} at {_short(rate / 1e9)} GB/s)"
    return f"{text}, at most {_short(pace.pictures / seconds)} fps" if pace.pictures else text


def _short(value: float) -> str:
    """Three digits, or as many as there are before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
