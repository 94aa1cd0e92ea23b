"""Whether calls may be recorded as CUDA graphs on a device."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

# "off" launches all kernels one by one.
SWITCH_VARIABLE = "STREAMBLOCKS_CUDA_GRAPHS"
OFF = "off"


def why_no_graphs(device: torch.device) -> str:
    """The reason why nothing is recorded on a device; empty where there is none."""
    if _is_switched_off():
        return f"switched off by the environment variable {SWITCH_VARIABLE}"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"needs CUDA, this is {device.type if torch.version.hip is None else 'ROCm'}"
    # While a graph is recorded the driver's allocator gives addresses that Triton's launcher refuses ("invalid
    # argument"), and freeing what was recorded until then ends the process (torch 2.11, H200).
    if torch.cuda.get_allocator_backend() != "native":
        return "needs torch's own allocator: start ComfyUI with --disable-cuda-malloc"
    return ""


def _is_switched_off() -> bool:
    value = os.environ.get(SWITCH_VARIABLE, "").strip().lower()
    if value not in ("", OFF):
        logger.warning("The environment variable %s is %r: the only value is %s.", SWITCH_VARIABLE, value, OFF)
    return value == OFF
