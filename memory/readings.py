"""The device's memory counters at one moment."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .tensor_bytes import live_tensor_bytes


@dataclass(frozen=True)
class MemoryReading:
    """Bytes of a device at one moment; None where it has no such counter.

    Attributes:
        allocated: in use by tensors: of torch's allocator on CUDA, counted tensors elsewhere.
        requested: what those tensors asked for. `allocated` jumps by up to a megabyte with how the allocator splits
            its blocks; this does not.
        peak: the most that was allocated since the previous reading.
        reserved: held by torch's allocator, in use or cached.
        inactive_split: cached bytes in pieces of larger blocks, which cannot go back to the card: fragmentation.
        retries: how often, so far, the allocator emptied its cache because an allocation did not fit.
        ooms: how often, so far, an allocation failed even after that.
        private_pools: of the reserved bytes, those in private pools, where CUDA graphs keep their memory.
        outside: in use on the card, but not by torch's allocator: CUDA's context and kernels, other programs.
    """

    allocated: int
    requested: int | None = None
    peak: int | None = None
    reserved: int | None = None
    inactive_split: int | None = None
    retries: int | None = None
    ooms: int | None = None
    private_pools: int | None = None
    outside: int | None = None

    @property
    def held(self) -> int:
        """What tensors hold, without the allocator's rounding where that is known."""
        return self.allocated if self.requested is None else self.requested


def read_cuda_memory(device: torch.device, *, with_outside: bool = False) -> MemoryReading:
    """Counters of torch's CUDA allocator, some 100 microseconds; starts a new peak.

    The counters follow the host's calls, not the device's work, so nothing waits.

    Args:
        device: a CUDA device.
        with_outside: also ask the driver how much of the card is in use.
    """
    stats = torch.cuda.memory_stats_as_nested_dict(device)
    torch.cuda.reset_peak_memory_stats(device)
    allocated = _count(stats, "allocated_bytes")
    reserved = _count(stats, "reserved_bytes")
    # cudaMallocAsync, the allocator that ComfyUI chooses by default, reports 0 for what it does not count.
    counted = _count(stats, "requested_bytes") > 0 or allocated == 0
    outside = None
    if with_outside:
        free, total = torch.cuda.mem_get_info(device)
        outside = total - free - reserved
    return MemoryReading(
        allocated=allocated,
        requested=_count(stats, "requested_bytes") if counted else None,
        peak=_count(stats, "allocated_bytes", "peak"),
        reserved=reserved,
        inactive_split=_count(stats, "inactive_split_bytes") if counted else None,
        retries=int(stats.get("num_alloc_retries", 0)) if counted else None,
        ooms=int(stats.get("num_ooms", 0)) if counted else None,
        private_pools=_private_pools(stats),
        outside=outside,
    )


def read_live_tensors(device: torch.device, *, collect: bool = True) -> MemoryReading:
    """All live tensors of a device without counters, exactly; looks at every object of the process.

    Args:
        device: whose kind counts.
        collect: collect garbage in reference cycles first; otherwise it counts, since it occupies memory.
    """
    return MemoryReading(allocated=live_tensor_bytes(device.type, collect=collect))


def card_bytes(device: torch.device) -> int | None:
    """Memory of a CUDA card; None for other devices."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def _private_pools(stats: dict[str, Any]) -> int | None:
    # torch 2.13 has this table, older ones may not.
    pools = stats.get("reserved_bytes_by_private_pools")
    return None if pools is None else sum(int(pool["all"]["current"]) for pool in pools.values())


def _count(stats: dict[str, Any], name: str, which: str = "current") -> int:
    # Absent before the first allocation of the process.
    return int(stats.get(name, {}).get("all", {}).get(which, 0))
