"""What linear layers with quantized weights have in common."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class QuantizedLinear(nn.Module):
    """A linear layer whose weight and scales keep their dtypes wherever it moves: `.to(bfloat16)` casts only the bias.

    Attributes:
        weight: in 8 bits, [out_features, in_features], not trainable.
        weight_scale: float32, [1, out_features] (per row) or [1, 1] (per tensor).
        bias: [out_features] or None.
        activations: one of `quantization.ACTIVATIONS`.
    """

    weight: nn.Parameter
    weight_scale: torch.Tensor

    def __init__(
        self, weight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None, activations: str
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.activations = activations
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.register_buffer("weight_scale", weight_scale)

    def decide_compute(self) -> None:
        """Choose the product for the device that the weights are on. Called when they are placed or moved."""
        raise NotImplementedError

    def dequantized_weight(self, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        """The weight that the layer computes with, `dtype` [out_features, in_features]."""
        return self.weight.to(dtype).mul_(self.weight_scale.t())

    def extra_repr(self) -> str:
        """Sizes and scheme, for `print(model)`."""
        weights = "per row" if self.weight_scale.numel() > 1 else "per tensor"
        return f"{self.in_features}, {self.out_features}, weights {weights}, activations {self.activations}"

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> QuantizedLinear:
        kept = {id(tensor) for tensor in (self.weight, *self.buffers())}

        def keeping_dtype(tensor: torch.Tensor) -> torch.Tensor:
            moved = fn(tensor)
            return tensor.to(moved.device) if id(tensor) in kept and moved.dtype != tensor.dtype else moved

        super()._apply(keeping_dtype, recurse)
        self.decide_compute()
        return self
