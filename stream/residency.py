"""Which components are on the device: a small protocol, so that ComfyUI's model management can decide."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import nn

from ..memory.cleanup import read_card_memory


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module, outside of inference mode: in it, torchao's quantized tensors cannot be moved."""
    with torch.inference_mode(False), torch.no_grad():
        module.to(device)


class Residency(Protocol):
    """Moves components to the device and makes room for them."""

    def available_bytes(self, device: torch.device) -> int | None:
        """Bytes a stream could use of `device` once all that can be evicted is; None when unknown."""

    def make_room(self, weight_bytes: int, device: torch.device) -> None:
        """Free device memory for weights about to be read from disk."""

    def bring(self, components: Mapping[str, nn.Module], device: torch.device, working_bytes: int) -> None:
        """Put `components` on `device`, with `working_bytes` left free for caches and activations."""

    def release(self) -> None:
        """Forget all components; they are about to be deleted."""


class PlainResidency:
    """Residency without ComfyUI: components are moved to the device and stay."""

    def available_bytes(self, device: torch.device) -> int | None:
        """Free memory of a CUDA card plus what this process has reserved; unknown for other devices."""
        memory = read_card_memory(device)
        return None if memory is None else memory.free + memory.reserved

    def make_room(self, weight_bytes: int, device: torch.device) -> None:
        """Nothing to free."""

    def bring(self, components: Mapping[str, nn.Module], device: torch.device, working_bytes: int) -> None:
        """Move each component."""
        for component in components.values():
            move_module(component, device)

    def release(self) -> None:
        """Nothing is held."""
