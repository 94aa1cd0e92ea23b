"""Whether calls may be recorded as CUDA graphs on a device."""

from __future__ import annotations

import logging
import os

import torch

logger = logging.getLogger(__name__)

# "off" launches all kernels one by one; "on" records also where it is not known to be good.
SWITCH_VARIABLE = "STREAMBLOCKS_CUDA_GRAPHS"
ON, OFF = "on", "off"


def why_no_graphs(device: torch.device) -> str:
    """The reason why nothing is recorded on a device; empty where there is none."""
    switch = _read_switch()
    if switch == OFF:
        return f"switched off by the environment variable {SWITCH_VARIABLE}"
    if device.type != "cuda" or torch.version.cuda is None:
        return f"needs CUDA, this is {device.type if torch.version.hip is None else 'ROCm'}"
    # There a graph's memory is the driver's, which torch does not give back when the graph has gone.
    if switch != ON and torch.cuda.get_allocator_backend() != "native":
        return (
            "needs torch's own allocator: start ComfyUI with --disable-cuda-malloc, or try it with the environment "
            f"variable {SWITCH_VARIABLE}={ON}"
        )
    return ""


def _read_switch() -> str:
    value = os.environ.get(SWITCH_VARIABLE, "").strip().lower()
    if value not in ("", ON, OFF):
        logger.warning("The environment variable %s is %r: use %s or %s.", SWITCH_VARIABLE, value, ON, OFF)
    return value
