"""FP8 activations where there are no FP8 units: the pack dequantizes the weight there and leaves the input as it is.

So that a CPU shows what the units' rounding costs, each input is rounded as they round it, then multiplied as before.
What is left out is the order in which the units add up.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from streamblocks.ops.fp8_linear import FP8Linear, round_to_fp8, supports_fp8_matmul


@contextmanager
def rounded_fp8_activations() -> Iterator[None]:
    """Inside, every `FP8Linear` on a device without FP8 units rounds its input as its `activations` say."""
    # torch types the hook as one that returns nothing.
    hook: Callable[..., None] = _round_input  # type: ignore[assignment]
    handle = register_module_forward_pre_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _round_input(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...] | None:
    """Replaces the layer's input, [..., in_features] of any float dtype."""
    if not isinstance(layer, FP8Linear) or layer.activations == "none" or supports_fp8_matmul(layer.weight.device):
        return None
    (x,) = inputs
    rows = x.flatten(0, -2)
    scale = layer.scale_of_input(rows)
    return ((round_to_fp8(rows, scale).float() * scale).to(x.dtype).view(x.shape),)
