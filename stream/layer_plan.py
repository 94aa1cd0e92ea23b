"""How many layers of a component stay on the device under a budget, how many are streamed, and from where."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from ..memory.byte_text import format_gb
from .layer_slots import SLOTS
from .read_ahead import STAGES


@dataclass(frozen=True)
class LayerPlan:
    """Which layers of a component are streamed.

    Attributes:
        component: its name.
        layers: how many it has.
        streamed: those that are streamed, by index.
        device_bytes: of the whole component on the device, slots among them.
        host_bytes: of the streamed layers in ordinary memory, and of what those on the disk are read into.
        on_disk: of the streamed layers, those that are read from the disk, by index.
        disk_bytes: of these.
    """

    component: str
    layers: int
    streamed: tuple[int, ...]
    device_bytes: int
    host_bytes: int
    on_disk: tuple[int, ...] = ()
    disk_bytes: int = 0

    def describe(self) -> str:
        """A clause for the user, without a full stop; empty when nothing is streamed."""
        if not self.streamed:
            return ""
        stay, from_ram = self.layers - len(self.streamed), len(self.streamed) - len(self.on_disk)
        parts = [f"{stay} of {self.layers} layers of the {self.component.replace('_', ' ')} stay on the device"]
        if from_ram:
            parts.append(f"{from_ram} are streamed from {format_gb(self.host_bytes)} of RAM")
        if self.on_disk:
            parts.append(f"{len(self.on_disk)} are read from {format_gb(self.disk_bytes)} on the disk")
        return ", ".join(parts)


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


def more_streamed(plan: LayerPlan, total: int, layer_bytes: Sequence[int]) -> LayerPlan | None:
    """`plan` with a tenth of the layers more streamed; None when none are left."""
    layers = len(layer_bytes)
    if layers <= max(SLOTS, len(plan.streamed)):
        return None
    more = len(plan.streamed) + -(-layers // 10)
    return _plan(plan.component, total, layer_bytes, min(layers, max(SLOTS + 1, more)))


def _plan(component: str, total: int, layer_bytes: Sequence[int], count: int) -> LayerPlan:
    layers = len(layer_bytes)
    streamed = spread_evenly(count, layers) if count else ()
    host = sum(layer_bytes[index] for index in streamed)
    slots = SLOTS * max((layer_bytes[index] for index in streamed), default=0)
    return LayerPlan(component, layers, streamed, total - host + slots, host)


def keep_on_disk(plan: LayerPlan, layer_bytes: Sequence[int], on_disk: Iterable[int]) -> LayerPlan:
    """`plan` with these of its streamed layers on the disk, by index."""
    kept = tuple(sorted(set(on_disk) & set(plan.streamed)))
    disk = sum(layer_bytes[index] for index in kept)
    stages = min(STAGES, len(kept)) * max((layer_bytes[index] for index in kept), default=0)
    host = sum(layer_bytes[index] for index in plan.streamed) - disk + stages
    return replace(plan, host_bytes=host, on_disk=kept, disk_bytes=disk)


def fit_into_memory(plan: LayerPlan, layer_bytes: Sequence[int], memory: int) -> LayerPlan:
    """`plan` with as many of its streamed layers on the disk, spread evenly, as do not fit into `memory` bytes of RAM.

    What layers on the disk are read into counts as well; it is needed even where there is no memory for it.
    """
    gone = len(plan.streamed)
    chosen = ((plan.streamed[place] for place in spread_evenly(count, gone)) for count in range(gone + 1))
    placed = [keep_on_disk(plan, layer_bytes, on_disk) for on_disk in chosen]
    return next((choice for choice in placed if choice.host_bytes <= memory), placed[-1])


def least_bytes(total: int, layer_bytes: Sequence[int]) -> int:
    """Bytes on the device of a component all of whose layers are streamed."""
    if len(layer_bytes) <= SLOTS:
        return total
    return total - sum(layer_bytes) + SLOTS * max(layer_bytes)


def spread_evenly(streamed: int, layers: int) -> tuple[int, ...]:
    """Which of `layers` layers are streamed: as far from one another as they can be, so that copies find time."""
    return tuple(int((place + 0.5) * layers / streamed) for place in range(streamed))
