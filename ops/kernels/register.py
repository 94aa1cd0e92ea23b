"""All GPU kernels of the pack, and which of them run."""

from __future__ import annotations

from typing import Any

import torch

from .few_key_launch import FEW_KEY_ATTENTION, FewKeyVariant
from .gelu_quantization_launch import GELU_QUANTIZATION
from .kernel import Kernel
from .layer_norm_launch import LAYER_NORM, LayerNormVariant
from .norm_silu_launch import NORM_SILU
from .rotary_store_launch import ROTARY_STORE, ROTARY_STORE_FP8, RotaryVariant

KERNELS: tuple[Kernel[Any], ...] = (
    NORM_SILU,
    ROTARY_STORE,
    ROTARY_STORE_FP8,
    FEW_KEY_ATTENTION,
    GELU_QUANTIZATION,
    LAYER_NORM,
)
RUNS = "runs"


def describe_kernels(
    device: torch.device,
    *,
    dtype: torch.dtype | None = None,
    vae_dtype: torch.dtype | None = None,
    heads: int | None = None,
    head_dim: int | None = None,
) -> dict[str, str]:
    """Which kernels run on a device.

    Args:
        device: of the tensors.
        dtype: of the transformer; None if unknown; unknown dtypes and sizes are taken as supported.
        vae_dtype: of the VAE.
        heads: of the transformer's attention.
        head_dim: of the transformer's attention.

    Returns:
        "runs" or the reason why not, by the kernel's name.
    """
    few = None if head_dim is None else FewKeyVariant(head_dim)
    rotary = None if heads is None or head_dim is None else RotaryVariant(heads * head_dim, head_dim)
    norm = None if heads is None or head_dim is None else LayerNormVariant(heads * head_dim, True, True, True, False)
    reasons = {
        NORM_SILU.name: NORM_SILU.why_not(device, vae_dtype),
        ROTARY_STORE.name: ROTARY_STORE.why_not(device, dtype, rotary),
        ROTARY_STORE_FP8.name: ROTARY_STORE_FP8.why_not(device, dtype, rotary),
        FEW_KEY_ATTENTION.name: FEW_KEY_ATTENTION.why_not(device, dtype, few),
        GELU_QUANTIZATION.name: GELU_QUANTIZATION.why_not(device, dtype),
        LAYER_NORM.name: LAYER_NORM.why_not(device, dtype, norm),
    }
    return {name.value: reason or RUNS for name, reason in reasons.items()}
