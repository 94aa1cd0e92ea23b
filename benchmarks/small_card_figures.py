"""What a stream on a small card took, and how it is told."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import streamblocks_path  # noqa: F401

from streamblocks.families.kv_policies import KV_IN_8_BITS, KV_PLAIN

GIB = 2**30
# GB/s that other slots carry.
BUSES = {"PCIe 4 x16": 25.0, "PCIe 3 x16": 12.5}


@dataclass(frozen=True)
class Case:
    """What is run: a cap in GiB (None: everything resident), a picture size, and what streaming brings along.

    Attributes:
        saving: keys and values in 8 bits, and the context's pass fused with the first step; None leaves it to the plan.
    """

    cap: float | None
    width: int
    height: int
    saving: bool | None = None


@dataclass(frozen=True)
class Figures:
    """What one stream took.

    Attributes:
        layers_streamed: of the transformer.
        resident_weight_bytes: of the transformer on the device, slots left out.
        streamed_weight_bytes: that are on the device at most: the slots.
        copied_bytes: over the bus in a steady block.
        fps: pictures a second, steady.
        block_seconds: of a steady block.
        peak_bytes: that torch reserved at most; None off CUDA.
        growth_bytes: from the third block to the last.
        bus_rate: GB/s that the copies of a block took of the whole block's time.
        kv_format: of the past.
        fused: whether the context went along with the first step.
        of_resident: fps, of those of everything resident and plain; 0 where that was not run.
        same_pictures: equal to those of everything resident, where that was run.
        largest_difference: from those, of 255.
        streaming: how the transformer's layers were streamed, and what set the pace.
        notices: of the plan.
        failed: why it did not run.
    """

    layers_streamed: int = 0
    resident_weight_bytes: int = 0
    streamed_weight_bytes: int = 0
    copied_bytes: int = 0
    fps: float = 0.0
    block_seconds: float = 0.0
    peak_bytes: int | None = None
    growth_bytes: int = 0
    bus_rate: float = 0.0
    kv_format: str = KV_PLAIN
    fused: bool = False
    of_resident: float = 0.0
    same_pictures: bool | None = None
    largest_difference: int = 0
    streaming: dict[str, Any] = field(default_factory=dict)
    notices: tuple[str, ...] = ()
    failed: str = ""

    def fps_on(self, rate: float) -> float:
        """Pictures a second where the bus carries `rate` GB/s and computing takes what it took here."""
        seconds = max(self.block_seconds, self.copied_bytes / (rate * 1e9))
        return self.fps * self.block_seconds / seconds if seconds else 0.0


def line(case: Case, figures: Figures) -> str:
    """One case as a line."""
    name = "resident" if case.cap is None else f"{case.cap:g} GiB"
    name += "" if figures.kv_format in KV_IN_8_BITS else ", plain"
    name += ", fused" if figures.fused else ""
    if figures.failed:
        return f"{name:>15} {case.width}x{case.height}: {figures.failed}"
    peak = "" if figures.peak_bytes is None else f", peak {figures.peak_bytes / GIB:.2f} GiB"
    buses = "".join(f", {figures.fps_on(rate):.2f} on {bus}" for bus, rate in BUSES.items())
    return (
        f"{name:>15} {case.width}x{case.height}: {figures.fps:.2f} fps ({figures.of_resident:.1%} of resident), "
        f"{figures.layers_streamed} layers streamed{peak}"
        f", growth {figures.growth_bytes}, {figures.copied_bytes / 1e9:.2f} GB a block at {figures.bus_rate:.1f} GB/s"
        f"{buses}{pace(figures.streaming)}, same pictures: {figures.same_pictures} (by {figures.largest_difference})"
    )


def pace(streaming: dict[str, Any]) -> str:
    """What the device waited for, of the last block's passes; empty where nothing is streamed."""
    if "bound" not in streaming:
        return ""
    waited = ", ".join(f"{source} {streaming[f'waited_for_{source}']:.0%}" for source in ("bus", "disk"))
    return f", bound by {streaming['bound']} (waited for {waited}), {streaming['layers_on_disk']} layers on the disk"
