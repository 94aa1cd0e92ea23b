"""The device, dtype and attention backend that a recipe's choices mean on this machine."""

from __future__ import annotations

import torch
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _check_attention_backend_requirements,
)
from torch.utils._triton import has_triton

from ..ops.attention_backends import LIBRARY_BACKENDS
from ..ops.library_attention import explain, load
from .recipe import COMPILE_NOTHING

# Of every model so far; what a model's own is, its transformer's first pass checks.
_USUAL_HEAD_DIM = 128
_ANY_DEVICE = frozenset({"native", "_native_math", "flex"})
_NO_MASK = frozenset({"flash", "_flash_3", "_native_flash", "sage"})


def choose_device(name: str, default: torch.device) -> torch.device:
    """The device a recipe names, with its index; "auto" is `default`.

    Raises:
        ValueError: the device does not exist or is not available on this machine.
    """
    try:
        # An empty tensor resolves the index of "cuda", and fails where there is no such device.
        return torch.empty(0, device=default if name == "auto" else name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device is {name!r}: not available on this machine ({error}); choose 'auto'.") from error


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype the transformer computes in.

    Raises:
        ValueError: the device does not support the requested dtype.
    """
    if name == "auto":
        if device.type == "cuda":
            return torch.bfloat16 if _has_bfloat16(device) else torch.float16
        return torch.bfloat16 if device.type == "xpu" else torch.float32
    if name == "bfloat16" and not _has_bfloat16(device):
        raise ValueError(f"dtype is bfloat16: {device} does not compute in it; choose float16 or 'auto'.")
    return getattr(torch, name)


def choose_vae_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """float16 with a 16-bit transformer on a GPU, else float32; CPUs are slow in float16."""
    sixteen_bit = dtype in (torch.float16, torch.bfloat16)
    return torch.float16 if sixteen_bit and device.type in ("cuda", "xpu") else torch.float32


def check_attention_backend(
    name: str, device: torch.device, attention_bias: float = 1.0, dtype: torch.dtype = torch.bfloat16
) -> None:
    """Check that the backend can run here; one of the pack's own is launched once on a few values.

    Args:
        name: one of `ATTENTION_BACKENDS`.
        device: of the transformer.
        attention_bias: of the stream; the pack's own leave passes with a bias to "native".
        dtype: of the transformer.

    Raises:
        ValueError: its package is missing, it does not run on the device, in the dtype or at all, or it takes no bias.
    """
    if name in LIBRARY_BACKENDS:
        if load(name, device, dtype, _USUAL_HEAD_DIM) is None:
            reason = explain(name, device, dtype, _USUAL_HEAD_DIM)
            raise ValueError(f"attention_backend is {name!r}: {reason}; choose 'native'.")
        return
    try:
        _check_attention_backend_requirements(AttentionBackendName(name))
    except RuntimeError as error:
        raise ValueError(f"attention_backend is {name!r}: {error} Or choose 'native'.") from error
    if name not in _ANY_DEVICE and device.type != "cuda":
        raise ValueError(f"attention_backend is {name!r}: it runs on CUDA, not on {device}; choose 'native'.")
    if attention_bias != 1.0 and name in _NO_MASK:
        raise ValueError(
            f"attention_bias is {attention_bias}: the attention backend {name!r} takes no bias; "
            "choose 'native' in the loader, or a bias of 1."
        )


def check_compile(choice: str, device: torch.device) -> None:
    """Check that torch.compile can generate kernels for the device.

    Raises:
        ValueError: it needs Triton, which is not installed.
    """
    if choice != COMPILE_NOTHING and device.type == "cuda" and not has_triton():
        raise ValueError(
            f"compile is {choice!r}: torch.compile needs the package triton (triton-windows on Windows), which is not "
            "installed; install it or choose 'off'."
        )


def _has_bfloat16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return True
