"""Whether this pack's Triton kernels run on a device."""

from __future__ import annotations

import functools
import importlib.util

import torch


def runs_kernel_on(device: torch.device) -> bool:
    """On CUDA, with Triton, which torch brings where it supports the GPU."""
    return device.type == "cuda" and _triton_is_there()


@functools.cache
def _triton_is_there() -> bool:
    return importlib.util.find_spec("triton") is not None
