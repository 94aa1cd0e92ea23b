"""torch.compile of the transformer's layers."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch._inductor.config
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from ...ops.compile_folder import keep_compiled_code
from ...ops.fp8_linear import FP8Linear

_TWO_ROOT_2_OVER_PI = 2.0 * math.sqrt(2.0 / math.pi)


def compile_transformer_blocks(transformer: WanTransformer3DModel, backend: str = "inductor") -> None:
    """Compile each block in place; all blocks share their graphs, one per picture size.

    Args:
        transformer: prepared by `install_causal_attention`.
        backend: of torch.compile.
    """
    options = _inductor_options() if backend == "inductor" else None
    if options is not None:
        keep_compiled_code()
    for block in transformer.blocks:
        activation, second = block.ffn.net[0], block.ffn.net[-1]
        if isinstance(activation, GELU) and activation.approximate == "tanh":
            fused = isinstance(second, FP8Linear) and second.take_gelu()
            activation.gelu = _leave if fused else gelu_by_sigmoid
        block.compile(backend=backend, dynamic=False, options=options)


def gelu_by_sigmoid(x: torch.Tensor) -> torch.Tensor:
    """GELU in its tanh approximation, written as x * sigmoid(2 u) with u = sqrt(2 / pi) * (x + 0.044715 x^3).

    The same function (Hendrycks and Gimpel 2016, "Gaussian Error Linear Units"; 1 + tanh(u) = 2 sigmoid(2 u)). A
    compiled sigmoid is one exponential and one division, a compiled tanh two branches of some forty operations: on an
    H200 the tanh is the bottleneck, not memory. For compiled code, which computes it in float32.
    """
    return x * torch.sigmoid(x * (_TWO_ROOT_2_OVER_PI + _TWO_ROOT_2_OVER_PI * 0.044715 * x * x))


def _leave(x: torch.Tensor) -> torch.Tensor:
    """Return `x` unchanged: the next layer applies GELU while it quantizes its input."""
    return x


def _inductor_options() -> dict[str, Any]:
    """Kernels are chosen by shapes, not by timing them here, and matrix products are the vendor's library's.

    Kernels that sum in another order give other pictures for the same seed, from one compilation to the next: after a
    restart, or when layers begin to be streamed. Without the second option inductor generates its own product kernels
    for integers and times them, even where no tuning is asked for (`tuned_int_mm`, torch 2.11 and 2.13).
    """
    options: dict[str, Any] = {"max_autotune_gemm_backends": "ATEN"}
    # Before 2.9 torch does not know it.
    if hasattr(torch._inductor.config, "deterministic"):
        options["deterministic"] = True
    return options
