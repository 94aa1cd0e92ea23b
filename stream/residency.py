"""Which components are on the device: a protocol that ComfyUI's model management can implement."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from ..memory.cleanup import read_card_memory, release_cached_memory
from ..memory.tensor_bytes import module_bytes
from .layer_streaming import streamer_of


def move_module(module: nn.Module, device: torch.device) -> None:
    """Move a module outside of inference mode, in which a quantization library's tensors cannot move.

    Streamed layers stay where they are; on their device they get slots.
    """
    streamer = streamer_of(module)
    with torch.inference_mode(False), torch.no_grad():
        if streamer is None:
            module.to(device)
        else:
            streamer.move(module, device)


def resident_bytes(module: nn.Module) -> int:
    """Bytes that a module takes on the device where it computes."""
    streamer = streamer_of(module)
    return module_bytes(module) if streamer is None else streamer.resident_bytes(module)


class Residency(Protocol):
    """Moves components to the device and makes room for them."""

    def available_bytes(self, device: torch.device) -> int | None:
        """Bytes of `device` a stream can use after everything evictable is evicted; None when unknown."""

    def streams_layers(self, device: torch.device) -> bool:
        """Whether layers that do not fit can be streamed: `device` has memory of its own, other than RAM."""

    def scratch_folders(self) -> Sequence[Path]:
        """Folders for what no RAM is left for, the best first, besides the system's."""

    def make_room(self, weight_bytes: int, device: torch.device) -> None:
        """Free device memory for weights about to be read from disk."""

    def bring(self, components: Mapping[str, nn.Module], device: torch.device, working_bytes: int) -> None:
        """Put `components` on `device`, with `working_bytes` left free for caches and activations."""

    def offload(self, name: str, module: nn.Module) -> None:
        """Move one component off the device; `bring` brings it back."""

    def offload_other_models(self, device: torch.device) -> bool:
        """Move models that are no components of a stream off the device; whether any was there."""

    def forget(self, name: str) -> None:
        """Forget one component, which is about to be deleted."""

    def release(self) -> None:
        """Drop all references to components, which are about to be deleted."""


class PlainResidency:
    """Residency without ComfyUI: components stay on the device until another one needs their memory."""

    def __init__(self) -> None:
        self._known: dict[str, nn.Module] = {}

    def available_bytes(self, device: torch.device) -> int | None:
        """Free memory of a CUDA card plus what this process has reserved; unknown for other devices."""
        memory = read_card_memory(device)
        return None if memory is None else memory.free + memory.reserved

    def streams_layers(self, device: torch.device) -> bool:
        """Wherever the device's memory is counted."""
        return self.available_bytes(device) is not None

    def scratch_folders(self) -> Sequence[Path]:
        """None: the system's will do."""
        return ()

    def make_room(self, weight_bytes: int, device: torch.device) -> None:
        """Evict all components if the device has less than `weight_bytes` left."""
        self._evict_unless_free(weight_bytes, device, keep=())

    def bring(self, components: Mapping[str, nn.Module], device: torch.device, working_bytes: int) -> None:
        """Move each component to the device; evict others if needed."""
        self._known.update(components)
        missing = sum(resident_bytes(module) for module in components.values() if not is_on_device(module, device))
        self._evict_unless_free(missing + working_bytes, device, keep=components)
        for component in components.values():
            move_module(component, device)

    def offload(self, name: str, module: nn.Module) -> None:
        """Move it to the CPU, and give its memory back."""
        device = next(module.parameters()).device
        move_module(module, torch.device("cpu"))
        release_cached_memory(device)

    def offload_other_models(self, device: torch.device) -> bool:
        """Return False: others are not known here."""
        return False

    def forget(self, name: str) -> None:
        """Forget one component."""
        self._known.pop(name, None)

    def release(self) -> None:
        """Drop all references to components."""
        self._known.clear()

    def _evict_unless_free(self, needed: int, device: torch.device, keep: Collection[str]) -> None:
        memory = read_card_memory(device)
        if memory is None or memory.free + memory.unused >= needed:
            return
        for name, module in self._known.items():
            if name not in keep:
                move_module(module, torch.device("cpu"))
        release_cached_memory(device)


def is_on_device(module: nn.Module, device: torch.device) -> bool:
    """Whether all parameters of the module are on `device`, those of streamed layers in slots."""
    streamer = streamer_of(module)
    if streamer is not None and not streamer.is_open:
        return False
    return all(parameter.device == device for parameter in module.parameters())
