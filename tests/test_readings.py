"""The reading of torch's CUDA counters, by the names that torch documents; no card is needed."""

import pytest
import torch

from streamblocks.memory.readings import MemoryReading, read_cuda_memory


def size(current, peak=0):
    return {"all": {"current": current, "peak": peak, "allocated": 0, "freed": 0}}


@pytest.fixture
def counters(monkeypatch):
    stats: dict = {}
    resets: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "memory_stats_as_nested_dict", lambda device: stats)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", resets.append)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (60, 100))
    return stats, resets


DEVICE = torch.device("cuda:0")


def test_all_counters_are_read_and_a_new_peak_begins(counters):
    stats, resets = counters
    stats |= {
        "allocated_bytes": size(20, peak=25),
        "requested_bytes": size(19),
        "reserved_bytes": size(30),
        "inactive_split_bytes": size(3),
        "num_alloc_retries": 2,
        "num_ooms": 1,
        "reserved_bytes_by_private_pools": {(0, 1): size(4), (0, 2): size(1)},
    }
    reading = read_cuda_memory(DEVICE, with_outside=True)
    assert reading == MemoryReading(20, 19, 25, 30, 3, 2, 1, private_pools=5, outside=10)
    assert reading.held == 19
    assert resets == [DEVICE]


def test_cuda_malloc_async_counts_less_and_its_zeros_are_not_taken_for_figures(counters):
    # ComfyUI's default allocator; torch documents that it reports the others as 0.
    stats, _ = counters
    stats |= {"allocated_bytes": size(20, peak=25), "requested_bytes": size(0), "reserved_bytes": size(30)}
    reading = read_cuda_memory(DEVICE)
    assert reading == MemoryReading(20, None, 25, 30)
    assert reading.held == 20


def test_before_the_first_allocation_all_is_zero(counters):
    assert read_cuda_memory(DEVICE) == MemoryReading(0, 0, 0, 0, 0, 0, 0)
