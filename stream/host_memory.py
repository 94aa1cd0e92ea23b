"""Where streamed layers are kept: in RAM as far as there is some, then on the disk."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType

import psutil

from ..memory.byte_text import format_gb
from .layer_plan import LayerPlan, fit_into_memory, keep_on_disk
from .scratch_disk import free_bytes

# RAM that is left to pictures, the system and other programs.
MARGIN = 2**30


def free_ram() -> int:
    """Bytes of RAM that a stream may take now."""
    return max(0, int(psutil.virtual_memory().available) - MARGIN)


def place_layers(
    plans: Mapping[str, LayerPlan],
    layer_bytes: Mapping[str, Sequence[int]],
    *,
    held: int,
    folder: Path | None,
    kept: int = 0,
    now: Mapping[str, Collection[int]] = MappingProxyType({}),
    reserved: int = 0,
) -> dict[str, LayerPlan]:
    """Decide which streamed layers are kept on the disk: those for which the machine's RAM is too small.

    Args:
        plans: by component, those that are run most often first: they get the RAM.
        layer_bytes: of each component's layers.
        held: bytes of streamed layers that are in RAM already.
        folder: for the disk; None where there is none.
        kept: bytes of streamed layers that are on the disk already.
        now: by component, which these are.
        reserved: bytes of RAM that something else of the stream takes.

    Raises:
        MemoryError: neither has room, with the figures and what to change.
    """
    free = max(0, int(psutil.virtual_memory().available) + held - reserved - MARGIN)
    placed, left = {}, free
    for name, plan in plans.items():
        placed[name] = _place(plan, layer_bytes[name], left, now.get(name, ()))
        left = max(0, left - placed[name].host_bytes)
    to_write = sum(plan.disk_bytes for plan in placed.values())
    room = free_bytes(folder) + kept if to_write and folder is not None else 0
    if to_write > room:
        needed = sum(layer_bytes[name][index] for name, plan in plans.items() for index in plan.streamed)
        disk = "no folder for temporary files is on a disk" if folder is None else f"{format_gb(room)} of {folder}"
        raise MemoryError(
            f"the streamed layers need {format_gb(needed)}: of RAM {format_gb(free)} can be used, and {disk}: close "
            "other programs, free some disk space, choose FP8, or give the stream more of the device's memory."
        )
    return placed


def _place(plan: LayerPlan, layer_bytes: Sequence[int], memory: int, now: Collection[int]) -> LayerPlan:
    """What fits; or what is on the disk now, where that is nearly the same: free memory is never twice the same."""
    best = fit_into_memory(plan, layer_bytes, memory)
    kept = keep_on_disk(plan, layer_bytes, now)
    few = 0.1 * len(plan.streamed)
    near = abs(len(kept.on_disk) - len(best.on_disk)) <= few and kept.host_bytes <= memory + MARGIN // 2
    return kept if kept.on_disk and best.on_disk and near else best
