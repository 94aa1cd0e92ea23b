"""Run a module whose layers do not all fit the device: those that do stay, the others are streamed through slots.

A streamed layer's weights lie packed in ordinary memory. A few slots on the device each hold one of them at a time:
every streamed layer belongs to one slot for good, and its parameters are views of that slot, so nothing that reads them
(a compiled graph, a kernel) sees anything move. When a layer is done, its slot is filled with the next layer of the
slot; the copies run beside the computing. Layers must be called in their order, each through its own call; one called
out of order is copied when it is called.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..memory.tensor_bytes import held_tensor_bytes
from .copy_queue import HostBlock, make_copy_queue
from .packed_layers import PackedLayer

SLOTS = 3
_ATTRIBUTE = "streamblocks_layer_streamer"


@dataclass
class _Slot:
    """Room for one layer on the device.

    Attributes:
        data: uint8, as large as its largest layer.
        layers: that pass through it, by index, in order.
        holds: which of them it holds, or will hold when the copy under way is done.
        ticket: of that copy.
    """

    data: torch.Tensor
    layers: tuple[int, ...]
    holds: int | None = None
    ticket: object = None

    def after(self, layer: int) -> int:
        """The layer that comes after `layer`, the first one after the last."""
        place = self.layers.index(layer) + 1
        return self.layers[place % len(self.layers)]


class LayerStreamer:
    """Keeps some layers of a module on the device and streams the others.

    `arrange` chooses which, `open` makes them callable, `close` gives the device's memory back. The layers do not refer
    to it, so it goes without a garbage collection.

    Args:
        layers: all of the module's repeated layers, in the order they are called.
        device: where they compute.
        slots: how many streamed layers are on the device at a time.

    Attributes:
        copied_bytes: copied to the device's slots so far.
        bus_rate: bytes a second that copies to the slots take, measured when they were opened last; 0 before.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, slots: int = SLOTS) -> None:
        self._layers = list(layers)
        self._device = device
        self._slot_count = slots
        self._queue = make_copy_queue(device)
        self._packed: dict[int, PackedLayer] = {}
        self._hosts: dict[int, HostBlock] = {}
        self._slots: list[_Slot] = []
        self._slot_of: dict[int, _Slot] = {}
        self._hooks: list[RemovableHandle] = []
        self.copied_bytes = 0
        self.bus_rate = 0.0

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the layers whose weights lie in ordinary memory."""
        return tuple(sorted(self._hosts))

    @property
    def bytes_when_open(self) -> int:
        """Bytes that the slots take on the device while they are open."""
        streamed = self.streamed
        return sum(
            max(self._packed[index].bytes for index in streamed[first :: self._slot_count])
            for first in range(min(self._slot_count, len(streamed)))
        )

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots on the device; 0 while they are closed."""
        return sum(slot.data.numel() for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of the streamed layers in ordinary memory."""
        return sum(block.data.numel() for block in self._hosts.values())

    @property
    def is_pinned(self) -> bool:
        """Whether all of that memory is pinned: copies from other memory do not run beside the computing."""
        return all(block.pinned for block in self._hosts.values())

    @property
    def is_open(self) -> bool:
        """Whether all layers can be called."""
        return bool(self._slots) or not self._hosts

    def arrange(self, streamed: Collection[int]) -> None:
        """Stream these layers, by index, and keep all others on the device; slots are closed.

        A layer that is on the device or elsewhere goes through the device on its way, where quantized layers choose
        their kernels; one that comes back takes device memory of its own.
        """
        self.close()
        with torch.inference_mode(False), torch.no_grad():
            for index in sorted(set(self._hosts) - set(streamed)):
                self._bring_back(index)
            for index in sorted(set(streamed) - set(self._hosts)):
                self._take_away(index)

    def open(self) -> None:
        """Allocate the slots, point the streamed layers to them and fill them."""
        if self._slots or not self._hosts:
            return
        streamed = self.streamed
        with torch.inference_mode(False), torch.no_grad():
            for first in range(min(self._slot_count, len(streamed))):
                layers = streamed[first :: self._slot_count]
                size = max(self._packed[index].bytes for index in layers)
                slot = _Slot(torch.empty(size, dtype=torch.uint8, device=self._device), layers)
                self._slots.append(slot)
                for index in layers:
                    self._slot_of[index] = slot
                    self._packed[index].point_to(slot.data)
                began = time.perf_counter()
                self._fill(slot, layers[0])
                self._queue.finish(slot.ticket)
                self.bus_rate = self._packed[layers[0]].bytes / (time.perf_counter() - began)
        for index in streamed:
            hook = _StreamingHook(weakref.ref(self), index)
            self._hooks.append(self._layers[index].register_forward_pre_hook(hook.before))
            self._hooks.append(self._layers[index].register_forward_hook(hook.after))

    def close(self) -> None:
        """Give the slots back; the streamed layers' tensors are views of ordinary memory until the next `open`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        with torch.inference_mode(False), torch.no_grad():
            for slot in self._slots:
                # The copy under way writes to memory that is about to be free.
                self._queue.wait(slot.ticket)
            for index in self._slot_of:
                self._packed[index].point_to(self._hosts[index].data)
        self._slot_of.clear()
        self._slots.clear()

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move a module with these layers: to their own device, and open the slots, or to another, and close them."""
        if device != self._device:
            self.close()
        streamed = {id(part) for index in self._hosts for part in self._layers[index].modules()}
        for part in module.modules():
            if id(part) not in streamed:
                part._apply(lambda tensor: tensor.to(device), recurse=False)
        if device == self._device:
            self.open()

    def resident_bytes(self, module: nn.Module) -> int:
        """Bytes that a module with these layers takes on the device while the slots are open."""
        streamed = {id(part) for index in self._hosts for part in self._layers[index].modules()}
        parts = [part for part in module.modules() if id(part) not in streamed]
        own = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
        return held_tensor_bytes(own) + self.bytes_when_open

    def before_layer(self, index: int) -> None:
        """Let the device wait for the layer's weights."""
        slot = self._slot_of[index]
        if slot.holds != index:
            self._fill(slot, index)
        self._queue.wait(slot.ticket)

    def after_layer(self, index: int) -> None:
        """Fill the layer's slot with the one that comes next through it."""
        slot = self._slot_of[index]
        if len(slot.layers) > 1:
            self._fill(slot, slot.after(index))

    def _fill(self, slot: _Slot, index: int) -> None:
        source = self._hosts[index].data
        slot.ticket = self._queue.copy_after_compute(slot.data[: source.numel()], source)
        slot.holds = index
        self.copied_bytes += source.numel()

    def _take_away(self, index: int) -> None:
        layer = self._layers[index]
        layer.to(self._device)
        packed = PackedLayer(layer)
        block = HostBlock(packed.bytes, pin=self._device.type == "cuda")
        packed.copy_to(block.data)
        packed.point_to(block.data)
        self._packed[index], self._hosts[index] = packed, block

    def _bring_back(self, index: int) -> None:
        source = self._hosts.pop(index)
        own = source.data.to(self._device, copy=True)
        self._packed.pop(index).point_to(own)
        source.release()


@dataclass(frozen=True)
class _StreamingHook:
    """A layer's hooks; they do not keep the streamer alive."""

    streamer: weakref.ref[LayerStreamer]
    index: int

    def before(self, layer: nn.Module, arguments: Any) -> None:  # noqa: ANN401
        """Before the layer's call."""
        streamer = self.streamer()
        if streamer is not None:
            streamer.before_layer(self.index)

    def after(self, layer: nn.Module, arguments: Any, made: Any) -> None:  # noqa: ANN401
        """After it, when its work is queued on the device."""
        streamer = self.streamer()
        if streamer is not None:
            streamer.after_layer(self.index)


def stream_layers(
    module: nn.Module, layers: Sequence[nn.Module], device: torch.device, streamed: Collection[int]
) -> None:
    """Stream these of a module's layers from now on, and make all of them callable.

    Args:
        module: whose layers they are; it keeps the streamer.
        layers: all of them, in the order they are called.
        device: where they compute.
        streamed: by index; the others stay on the device.
    """
    streamer = streamer_of(module)
    if streamer is None:
        streamer = LayerStreamer(layers, device)
        module.__dict__[_ATTRIBUTE] = streamer
    streamer.arrange(streamed)
    streamer.open()


def streamer_of(module: nn.Module) -> LayerStreamer | None:
    """The streamer of a module's layers; None if it has none."""
    return module.__dict__.get(_ATTRIBUTE)


def spread_evenly(streamed: int, layers: int) -> tuple[int, ...]:
    """Which of `layers` layers are streamed: as far from one another as they can be, so that copies find time."""
    return tuple(int((place + 0.5) * layers / streamed) for place in range(streamed))
