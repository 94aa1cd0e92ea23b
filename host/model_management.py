"""Devices, and the stream's components under ComfyUI's model management."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import torch
from torch import nn

from ..stream.residency import is_on_device, move_module, resident_bytes
from .files_made import temp_folder


def default_device() -> torch.device:
    """The device ComfyUI computes on."""
    return comfy.model_management.get_torch_device()


def device_names() -> list[str]:
    """Devices a user can choose: "auto", "cpu", and each CUDA card."""
    cards = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    return ["auto", *cards, "cpu"]


def other_models() -> dict[str, nn.Module]:
    """ComfyUI's models that are not part of a stream, by class and index in its list."""
    loaded = [entry.model for entry in comfy.model_management.current_loaded_models if not entry.is_dead()]
    others = [patcher.model for patcher in loaded if not isinstance(patcher, WholeModelPatcher)]
    return {f"{type(model).__name__} {index}": model for index, model in enumerate(others)}


def unload_all_models() -> None:
    """Offload all of ComfyUI's models from the device."""
    comfy.model_management.unload_all_models()


class WholeModelPatcher(comfy.model_patcher.ModelPatcher):
    """A module that ComfyUI's model management moves to and from the device as a whole.

    The stock patcher leaves modules without ComfyUI's cast weights on the CPU when they do not fit; diffusers'
    modules cannot run from there.
    """

    def loaded_size(self) -> int:
        """Bytes of the module on the load device: all or none."""
        return self.model_size() if is_on_device(self.model, self.load_device) else 0

    def current_loaded_device(self) -> torch.device:
        """Where the module's weights are."""
        return next(self.model.parameters()).device

    def partially_load(self, device_to: torch.device, extra_memory: float = 0, **_: Any) -> int:  # noqa: ANN401
        """Move the module to the device; returns its bytes."""
        self.to(device_to)
        return self.model_size()

    def partially_unload(self, device_to: torch.device, memory_to_free: float = 0, **_: Any) -> int:  # noqa: ANN401
        """Offload the module; returns its bytes."""
        self.to(device_to)
        return self.model_size()

    def detach(self, unpatch_all: bool = True) -> nn.Module:
        """Offload the module."""
        if unpatch_all:
            self.to(self.offload_device)
        return self.model

    def to(self, device: torch.device) -> None:
        """Move the module as a whole; if the device runs out of memory, offload it again."""
        try:
            move_module(self.model, device)
        except torch.OutOfMemoryError:
            move_module(self.model, self.offload_device)
            raise


class ComfyResidency:
    """Components under ComfyUI's model management: other models are evicted for ours, and ours for others."""

    def __init__(self) -> None:
        # ComfyUI keeps only weak references to patchers, so they are kept alive here.
        self._patchers: dict[str, WholeModelPatcher] = {}

    def available_bytes(self, device: torch.device) -> int | None:
        """Free memory of `device`, plus the memory of ComfyUI's models there, which can be evicted."""
        held = sum(
            entry.model_memory() - entry.model_offloaded_memory()
            for entry in comfy.model_management.current_loaded_models
            if entry.device == device and not entry.is_dead()
        )
        return int(comfy.model_management.get_free_memory(device)) + held

    def streams_layers(self, device: torch.device) -> bool:
        """Not on a CPU, whose memory is the RAM that the layers would be streamed from."""
        return device.type != "cpu"

    def scratch_folders(self) -> Sequence[Path]:
        """ComfyUI's temp folder, which users move to a large disk."""
        return (temp_folder(),)

    def make_room(self, weight_bytes: int, device: torch.device) -> None:
        """Evict other models from `device` until `weight_bytes` are free."""
        if device.type != "cpu":
            needed = weight_bytes + comfy.model_management.minimum_inference_memory()
            comfy.model_management.free_memory(needed, device)

    def bring(self, components: Mapping[str, nn.Module], device: torch.device, working_bytes: int) -> None:
        """Load `components` onto `device`, with `working_bytes` left free for caches and activations."""
        patchers = [self._patcher(name, module, device) for name, module in components.items()]
        comfy.model_management.load_models_gpu(patchers, memory_required=working_bytes, force_full_load=True)

    def offload(self, name: str, module: nn.Module) -> None:
        """Unload one component, as ComfyUI does when it needs the memory."""
        patcher = self._patchers.get(name)
        loaded = comfy.model_management.current_loaded_models
        for entry in [entry for entry in loaded if entry.model is patcher]:
            entry.model_unload()
            loaded.remove(entry)
        move_module(module, torch.device("cpu"))
        comfy.model_management.soft_empty_cache()

    def offload_other_models(self, device: torch.device) -> bool:
        """Unload all models but the stream's components from `device`, as ComfyUI does when it needs the memory."""
        loaded = comfy.model_management.current_loaded_models
        ours = [entry for entry in loaded if isinstance(entry.model, WholeModelPatcher)]
        others = [entry for entry in loaded if entry.device == device and not entry.is_dead() and entry not in ours]
        if not others or device.type == "cpu":
            return False
        # More than any device has.
        comfy.model_management.free_memory(1e30, device, keep_loaded=ours)
        return True

    def forget(self, name: str) -> None:
        """Take the patcher of one component off ComfyUI's list, without moving weights that are about to be deleted."""
        patcher = self._patchers.pop(name, None)
        loaded = comfy.model_management.current_loaded_models
        loaded[:] = [entry for entry in loaded if patcher is None or entry.model is not patcher]

    def release(self) -> None:
        """Take all patchers off ComfyUI's list."""
        for name in list(self._patchers):
            self.forget(name)

    def _patcher(self, name: str, module: nn.Module, device: torch.device) -> WholeModelPatcher:
        patcher = self._patchers.get(name)
        if patcher is None or patcher.model is not module:
            patcher = WholeModelPatcher(module, load_device=device, offload_device=torch.device("cpu"))
            self._patchers[name] = patcher
        # ComfyUI counts quantized tensors at their logical size, and streamed layers as if they were on the device.
        patcher.size = resident_bytes(module)
        return patcher
