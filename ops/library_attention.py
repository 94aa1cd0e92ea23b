"""Self-attention by packages that diffusers does not dispatch to: FlashAttention 3 in 16 and 8 bits, INT8.

All are optional. `why_not` says in words what is missing; `load` launches a backend once on a few values before it is
used, and compares them, because compiled layers launch it from inside a graph, where it is too late to choose another.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging

import torch
from torch.nn import functional as F

from .attention_backends import COMFY_INT8, EIGHT_BIT, EIGHT_BIT_CHOICES, FLASH3, FLASH3_FP8_SMOOTH
from .flash3 import HOPPER, MOST_HEAD_DIM, find_flash3, flash3
from .head_quantization import quantize_heads, smooth_keys
from .trial_launches import TrialLaunches

logger = logging.getLogger(__name__)

_COMFY_MODULE = "comfy_kitchen"
_COMFY_CAPABILITY = (7, 5)
_TRIAL_TOKENS = (48, 80)
# 8 bits are off by about 5 % on noise; wrong values are off by 100.
_MOST_TRIAL_ERROR = 0.2

ATTENTION_TRIALS = TrialLaunches()


def why_not(
    name: str, device: torch.device, dtype: torch.dtype | None = None, head_dim: int | None = None
) -> str | None:
    """Why a backend does not run, as a part of a sentence that begins with "it"; None if it runs.

    Args:
        name: one of `LIBRARY_BACKENDS`, but for `EIGHT_BIT`.
        device: of the tensors.
        dtype: of the tensors; None if unknown, and then not checked.
        head_dim: of the attention; None if unknown, and then not checked.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        return f"it runs on CUDA, not on {device.type}"
    reason = _why_not_comfy(device) if name == COMFY_INT8 else _why_not_flash3(name, device, dtype, head_dim)
    if reason is not None or name not in ATTENTION_TRIALS.failed:
        return reason
    return f"it failed its trial launch ({ATTENTION_TRIALS.failed[name]})"


def _choices(name: str) -> tuple[str, ...]:
    return EIGHT_BIT_CHOICES if name == EIGHT_BIT else (name,)


def load(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """The backend to give `attend`: `name`, or for `EIGHT_BIT` the first that runs; None if none does.

    The first call for a device, dtype and size launches it once on a few values. Call it outside of compiled code.

    Raises:
        torch.OutOfMemoryError: no memory for the trial; the backend is not counted as failed.
    """
    for choice in _choices(name):
        if why_not(choice, device, dtype, head_dim) is None and _passes(choice, device, dtype, head_dim):
            return choice
    return None


def expect(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """What `load` gives unless a trial launch fails that has not been made yet; nothing is launched."""
    return next((choice for choice in _choices(name) if why_not(choice, device, dtype, head_dim) is None), None)


def explain(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Why `load` gave None, as a part of a sentence."""
    reasons = {choice: why_not(choice, device, dtype, head_dim) for choice in _choices(name)}
    if name != EIGHT_BIT:
        return reasons[name] or "it runs"
    return "; ".join(f"of {choice}, {reason}" for choice, reason in reasons.items())


def attend(name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """softmax(q k / sqrt(head_dim)) v, without a mask. May be compiled.

    Args:
        name: of `load`.
        query: [batch, queries, heads, head_dim].
        key: [batch, keys, heads, head_dim], the dtype of `query`.
        value: the shape and dtype of `key`.

    Returns:
        The shape and dtype of `query`.
    """
    if name == COMFY_INT8:
        by_head = (part.transpose(1, 2) for part in (query, key, value))
        made: torch.Tensor = torch.ops.comfy_kitchen.int8_attention(*by_head, None)
        return made.transpose(1, 2)
    if name == FLASH3:
        return flash3(query, key, value, None, None, None)
    if name == FLASH3_FP8_SMOOTH:
        key = smooth_keys(key)
    parts = (quantize_heads(part) for part in (query, key, value))
    (query_8, query_scale), (key_8, key_scale), (value_8, value_scale) = parts
    return flash3(query_8, key_8, value_8, query_scale, key_scale, value_scale).type_as(query)


def _why_not_flash3(name: str, device: torch.device, dtype: torch.dtype | None, head_dim: int | None) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability[0] != HOPPER:
        return f"it needs a Hopper card (compute capability 9.0), and {device} has {'.'.join(map(str, capability))}"
    if find_flash3() is None:
        return "it needs the package fa3-fwd (or FlashAttention 3 built from its source), which is not installed"
    if dtype not in (None, torch.bfloat16):
        return f"it computes in bfloat16, and the transformer in {str(dtype).removeprefix('torch.')}"
    step = 8 if name == FLASH3 else 16
    if head_dim is not None and (head_dim % step or head_dim > MOST_HEAD_DIM):
        return f"it needs heads of {step}, {2 * step} and so on up to {MOST_HEAD_DIM} values, and they have {head_dim}"
    return None


def _why_not_comfy(device: torch.device) -> str | None:
    capability = torch.cuda.get_device_capability(device)
    if capability < _COMFY_CAPABILITY:
        return f"it needs compute capability 7.5, and {device} has {'.'.join(map(str, capability))}"
    if importlib.util.find_spec(_COMFY_MODULE) is None:
        return "it needs the package comfy-kitchen, which is not installed"
    return None


def _passes(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> bool:
    if ATTENTION_TRIALS.succeeds(name, device, dtype, head_dim, lambda: _try_out(name, device, dtype, head_dim)):
        return True
    logger.warning(
        "The attention backend %s is not used: its trial launch failed. %s", name, ATTENTION_TRIALS.failed[name]
    )
    return False


@torch.no_grad()
def _try_out(name: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> None:
    if name == COMFY_INT8:
        # Registers the operator that `attend` calls.
        importlib.import_module(f"{_COMFY_MODULE}.sage_attention")
    # Drawn on the CPU: the device's own generator belongs to the stream.
    drawn = torch.Generator().manual_seed(0)
    queries, keys = _TRIAL_TOKENS
    query, key, value = (
        torch.randn((1, tokens, 2, head_dim), generator=drawn).to(device, dtype) for tokens in (queries, keys, keys)
    )
    made = attend(name, query, key, value).float()
    by_head = [part.float().transpose(1, 2) for part in (query, key, value)]
    exact = F.scaled_dot_product_attention(by_head[0], by_head[1], by_head[2])
    error = float((made - exact.transpose(1, 2)).norm() / exact.norm())
    if not error < _MOST_TRIAL_ERROR:
        raise ArithmeticError(f"its values are off by {100 * error:.0f} %")
