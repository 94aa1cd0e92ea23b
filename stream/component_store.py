"""The components of a pipeline: each read from disk, onto the device, when first needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from functools import cached_property
from pathlib import Path

import torch
from torch import nn

from ..checkpoints.component import Component
from ..checkpoints.finite_weights import explain_bad_weight
from .layer_streaming import LayerStreamer, start_streaming, streamer_of
from .residency import Residency, is_on_device, resident_bytes
from .scratch_disk import folder_on_disk, usual_folders

logger = logging.getLogger(__name__)

# The text encoder is needed before a block only.
BLOCK_COMPONENTS = ("transformer", "vae", "decoder")

# Component, bytes in place so far, bytes in all.
LoadCallback = Callable[[str, int, int], None]


def ignore_load(component: str, done: int, total: int) -> None:
    """Ignore the progress of loading."""


class ComponentStore:
    """Loads components, and moves them to the device through the residency.

    Args:
        components: by name, known from their headers.
        device: where they compute.
        residency: decides what is on the device.

    Attributes:
        components: as given, or exchanged since.
        device: as given.
        on_load: called after each tensor is loaded.
        budget: bytes of the device that weights and working memory may take; None for as much as there is.
        on_disk: by component, the streamed layers that are kept on the disk.
    """

    def __init__(self, components: Mapping[str, Component], device: torch.device, residency: Residency) -> None:
        self.components = components
        self.on_load: LoadCallback = ignore_load
        self.budget: int | None = None
        self.on_disk: dict[str, tuple[int, ...]] = {}
        self.device = device
        self._residency = residency
        self._modules: dict[str, nn.Module] = {}
        self._streamed: dict[str, tuple[int, ...]] = {}
        self._unsettled: set[str] = set()

    def stream_layers(self, name: str, streamed: tuple[int, ...], on_disk: tuple[int, ...] = ()) -> None:
        """Stream these layers of a component, by index, from now on; a loaded one is rearranged.

        Args:
            name: of the component.
            streamed: its layers that do not stay on the device.
            on_disk: of these, those that are kept on the disk instead of in RAM.

        Raises:
            OSError: the disk is full.
        """
        is_so = (self._streamed.get(name, ()), self.on_disk.get(name, ())) == (streamed, on_disk)
        if is_so and name not in self._unsettled:
            return
        self._streamed[name], self.on_disk[name] = streamed, on_disk
        module = self._modules.get(name)
        if module is not None:
            # One that fails on the way is arranged anew by whoever comes next.
            self._unsettled.add(name)
            self._arrange(self.components[name], module)
        self._unsettled.discard(name)

    def load(self, name: str) -> nn.Module:
        """The module of a component, read from disk at the first call."""
        if name not in self._modules:
            component = self.components[name]
            away = sum(component.layer_bytes[index] for index in self._streamed.get(name, ()))
            self._make_way([name], component.bytes - away)
            self._residency.make_room(component.bytes - away, self.device)
            self._modules[name] = self._read(component)
            # Immediately: the residency cannot evict weights that are not registered with it.
            self.bring([name], working_bytes=0)
        return self._modules[name]

    def bring(self, names: Iterable[str], working_bytes: int) -> None:
        """Move loaded components to the device, with `working_bytes` left free for caches and activations."""
        modules = {name: self._modules[name] for name in names}
        self._make_way(modules, sum(resident_bytes(module) for module in modules.values()) + working_bytes)
        self._residency.bring(modules, self.device, working_bytes)

    def offload_all_but(self, names: Collection[str]) -> list[str]:
        """Move loaded components other than these off a device with memory of its own; returns which."""
        if not self._residency.streams_layers(self.device):
            return []
        others = [(name, module) for name, module in self._modules.items() if name not in names]
        leaving = [(name, module) for name, module in others if is_on_device(module, self.device)]
        for name, module in leaving:
            self._residency.offload(name, module)
        return [name for name, _ in leaving]

    def streamer(self, name: str) -> LayerStreamer | None:
        """The streamer of a component's layers; None if it is not loaded or none were ever streamed."""
        module = self._modules.get(name)
        return None if module is None else streamer_of(module)

    @property
    def host_bytes(self) -> int:
        """Bytes of streamed layers in ordinary memory now."""
        return sum(streamer.host_bytes for streamer in self._streamers())

    @property
    def disk_bytes(self) -> int:
        """Bytes of streamed layers on the disk now."""
        return sum(streamer.disk_bytes for streamer in self._streamers())

    @cached_property
    def scratch_folder(self) -> Path | None:
        """Where layers are kept for which there is no RAM; None where every folder for temporary files is RAM."""
        return folder_on_disk((*self._residency.scratch_folders(), *usual_folders()))

    def of_blocks(self) -> tuple[str, ...]:
        """The components that a block needs, as far as there are any."""
        return tuple(name for name in BLOCK_COMPONENTS if name in self.components)

    def are_resident(self, names: Iterable[str]) -> bool:
        """Whether these components are loaded and on the device."""
        return all_on_device([self._modules.get(name) for name in names], self.device)

    def explain_bad_weight(self) -> str | None:
        """Which tensor of a loaded component is not finite, and what to do; None when all are finite."""
        for name, module in self._modules.items():
            streamer = streamer_of(module)
            if streamer is not None:
                # Open, a layer's tensors hold whichever layer its slot holds.
                streamer.close()
            explained = explain_bad_weight(self.components[name], module)
            if explained is not None:
                return explained
        return None

    def exchange(self, component: Component) -> None:
        """Put a component in the place of the one of its name, whose module is let go of before another is read."""
        self._residency.forget(component.name)
        self._modules.pop(component.name, None)
        self.components = {**self.components, component.name: component}

    def release(self) -> None:
        """Release all modules."""
        self._residency.release()
        self._modules.clear()

    def _make_way(self, names: Collection[str], needed: int) -> None:
        """Offload other components until `needed` bytes and what stays are within the budget."""
        if self.budget is None:
            return
        others = [(name, module) for name, module in self._modules.items() if name not in names]
        held = [(name, module) for name, module in others if is_on_device(module, self.device)]
        while held and needed + sum(resident_bytes(module) for _, module in held) > self.budget:
            self._residency.offload(*held.pop())

    def _read(self, component: Component) -> nn.Module:
        if component.plan.spec is not None:
            logger.info("%s", component.plan.summary())
        total, placed = component.bytes, 0

        def on_tensor(_: str, tensor_bytes: int) -> None:
            nonlocal placed
            placed += tensor_bytes
            self.on_load(component.name, placed, total)

        streamed, on_disk = self._streamed.get(component.name, ()), self.on_disk.get(component.name, ())

        def take_layer(module: nn.Module, index: int) -> None:
            self._started_streamer(component, module).take_to_disk(index)

        def settle(module: nn.Module) -> None:
            if streamed:
                self._arrange(component, module)

        return component.load(
            self.device,
            on_tensor,
            off_device=tuple(index for index in streamed if index not in on_disk),
            one_by_one=on_disk,
            take_layer=take_layer,
            settle=settle,
        )

    def _streamers(self) -> Iterator[LayerStreamer]:
        for module in self._modules.values():
            streamer = streamer_of(module)
            if streamer is not None:
                yield streamer

    def _arrange(self, component: Component, module: nn.Module) -> None:
        """Have the component's layers where they belong now, all of them callable."""
        streamer = self._started_streamer(component, module)
        streamer.arrange(self._streamed[component.name], self.on_disk[component.name])
        streamer.open()

    def _started_streamer(self, component: Component, module: nn.Module) -> LayerStreamer:
        return start_streaming(module, component.layers_of(module), self.device, self.scratch_folder)


def all_on_device(modules: Iterable[nn.Module | None], device: torch.device) -> bool:
    """Whether all parameters of the modules are on `device`; False when a module is None."""
    return all(module is not None and is_on_device(module, device) for module in modules)
