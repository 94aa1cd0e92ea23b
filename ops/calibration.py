"""Measure the input range of FP8 layers, for static activation scales."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .fp8_linear import FP8Linear, fp8_scale, largest_magnitude


@contextmanager
def calibrating(model: nn.Module, *, headroom: float = 1.0) -> Iterator[None]:
    """Run the model inside the `with` block; its static FP8 layers get `input_scale` = headroom * max |x| / 448.

    Layers that saw no input keep what they had. Nothing is set when the block raises.

    Raises:
        ValueError: `model` has no FP8 layer with static activations, or `headroom` is not above 0.
    """
    layers = [module for module in model.modules() if isinstance(module, FP8Linear) and module.activations == "static"]
    if not layers or headroom <= 0:
        raise ValueError(
            f"headroom is {headroom} and {len(layers)} layers have static activations: give a headroom above 0 and a "
            "model quantized with activations 'static'."
        )
    seen: dict[FP8Linear, torch.Tensor] = {}

    def observe(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        assert isinstance(layer, FP8Linear)
        rows = inputs[0].detach().reshape(-1, layer.in_features)
        if rows.shape[0]:
            magnitude = largest_magnitude(rows, "per tensor")
            seen[layer] = torch.maximum(seen[layer], magnitude) if layer in seen else magnitude

    handles = [layer.register_forward_pre_hook(observe) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    for layer, magnitude in seen.items():
        layer.input_scale = fp8_scale(magnitude * headroom)
