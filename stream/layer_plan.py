"""How many layers of a component stay on the device under a budget, and how many are streamed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import psutil

from ..memory.byte_text import format_gb
from .layer_streaming import SLOTS, spread_evenly


@dataclass(frozen=True)
class LayerPlan:
    """Which layers of a component are streamed.

    Attributes:
        component: its name.
        layers: how many it has.
        streamed: those that are streamed, by index.
        device_bytes: of the whole component on the device, slots among them.
        host_bytes: of the streamed layers in ordinary memory.
    """

    component: str
    layers: int
    streamed: tuple[int, ...]
    device_bytes: int
    host_bytes: int

    def describe(self) -> str:
        """One sentence for the user; empty when nothing is streamed."""
        if not self.streamed:
            return ""
        stay, gone = self.layers - len(self.streamed), len(self.streamed)
        return (
            f"{stay} of {self.layers} layers of the {self.component.replace('_', ' ')} stay on the device, {gone} are "
            f"streamed from {format_gb(self.host_bytes)} of RAM."
        )


def plan_layers(component: str, total: int, layer_bytes: Sequence[int], budget: int | None) -> LayerPlan | None:
    """Keep as many layers on the device as the budget allows.

    Args:
        component: its name.
        total: bytes of the whole component.
        layer_bytes: of each of its repeated layers; empty if it has none.
        budget: bytes on the device for the component; None for no bound.

    Returns:
        None when not even one layer at a time fits.
    """
    # Fewer layers than slots would take as much as if they stayed.
    for count in (0, *range(SLOTS + 1, len(layer_bytes) + 1)):
        plan = _plan(component, total, layer_bytes, count)
        if budget is None or plan.device_bytes <= budget:
            return plan
    return None


def more_streamed(plan: LayerPlan | None, total: int, layer_bytes: Sequence[int]) -> LayerPlan | None:
    """`plan` with a tenth of the layers more streamed; None when there is no plan or none are left."""
    layers = len(layer_bytes)
    if plan is None or layers <= max(SLOTS, len(plan.streamed)):
        return None
    more = len(plan.streamed) + -(-layers // 10)
    return _plan(plan.component, total, layer_bytes, min(layers, max(SLOTS + 1, more)))


def _plan(component: str, total: int, layer_bytes: Sequence[int], count: int) -> LayerPlan:
    layers = len(layer_bytes)
    streamed = spread_evenly(count, layers) if count else ()
    host = sum(layer_bytes[index] for index in streamed)
    slots = SLOTS * max((layer_bytes[index] for index in streamed), default=0)
    return LayerPlan(component, layers, streamed, total - host + slots, host)


def least_bytes(total: int, layer_bytes: Sequence[int]) -> int:
    """Bytes on the device of a component all of whose layers are streamed."""
    if len(layer_bytes) <= SLOTS:
        return total
    return total - sum(layer_bytes) + SLOTS * max(layer_bytes)


def check_host_memory(plans: Iterable[LayerPlan], held: int, decoder: int = 0) -> None:
    """Raise unless what is kept in RAM instead of on the device fits there.

    Args:
        plans: of all components.
        held: bytes of streamed layers that are in RAM already.
        decoder: bytes of the decoder's cache, where that lies in RAM.

    Raises:
        MemoryError: with the figures, and what to change.
    """
    needed = sum(plan.host_bytes for plan in plans) + decoder
    free = int(psutil.virtual_memory().available) + held
    if needed > free:
        cache = " and the cache of the decoder" if decoder else ""
        raise MemoryError(
            f"the streamed layers{cache} need {format_gb(needed)} of RAM and {format_gb(free)} are free: close other "
            "programs, choose FP8, or give the stream more of the device's memory."
        )
