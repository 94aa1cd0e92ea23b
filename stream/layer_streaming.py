"""Run a module whose layers do not all fit the device: those that do stay, the others are streamed through slots.

A streamed layer's weights lie packed in ordinary memory, or on the disk where there is too little of it. A few slots on
the device each hold one of them at a time: every streamed layer belongs to one slot for good, and its parameters are
views of that slot, so nothing that reads them (a compiled graph, a kernel) sees anything move. When a layer is done,
its slot is filled with the next layer of the slot; the copies run beside the computing. Layers must be called in their
order, each through its own call; one called out of order is copied when it is called.
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..memory.tensor_bytes import held_tensor_bytes
from .copy_queue import make_copy_queue
from .layer_slots import SLOTS, LayerSlot, shares
from .read_ahead import ReadAhead, ReadCount
from .stall_clock import BUS, DISK, StallClock
from .stored_layers import StoredLayers

_ATTRIBUTE = "streamblocks_layer_streamer"


class LayerStreamer:
    """Keeps some layers of a module on the device and streams the others.

    `arrange` chooses which, `open` makes them callable, `close` gives the device's memory back. The layers do not refer
    to it, so it goes without a garbage collection.

    Args:
        layers: all of the module's repeated layers, in the order they are called.
        device: where they compute.
        slots: how many streamed layers are on the device at a time.
        folder: for layers that are kept on the disk; None for the system's.

    Attributes:
        copied_bytes: copied to the device's slots so far.
        bus_rate: bytes a second that copies to the slots take, measured when they were opened last; 0 before.
        disk: what was read from the disk so far, and how fast.
        stalls: how long the device waited for layers.
    """

    def __init__(
        self, layers: Sequence[nn.Module], device: torch.device, slots: int = SLOTS, folder: Path | None = None
    ) -> None:
        self._layers = list(layers)
        self._device = device
        self._slot_count = slots
        self._queue = make_copy_queue(device)
        self._stored = StoredLayers(layers, device, folder)
        self._reader: ReadAhead | None = None
        self._slots: list[LayerSlot] = []
        self._slot_of: dict[int, LayerSlot] = {}
        self._hooks: list[RemovableHandle] = []
        self.copied_bytes = 0
        self.bus_rate = 0.0
        self.disk = ReadCount()
        self.stalls = StallClock(self._queue)

    @property
    def streamed(self) -> tuple[int, ...]:
        """Indices of the layers whose weights do not stay on the device."""
        return self._stored.indices

    @property
    def on_disk(self) -> tuple[int, ...]:
        """Those of them that are read from the disk."""
        return tuple(sorted(self._stored.on_disk))

    @property
    def bytes_when_open(self) -> int:
        """Bytes that the slots take on the device while they are open."""
        return sum(map(self._slot_size, shares(self.streamed, self._slot_count)))

    @property
    def slot_bytes(self) -> int:
        """Bytes of the slots on the device; 0 while they are closed."""
        return sum(slot.data.numel() for slot in self._slots)

    @property
    def host_bytes(self) -> int:
        """Bytes of the streamed layers in ordinary memory."""
        return self._stored.host_bytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the streamed layers on the disk."""
        return self._stored.disk_bytes

    @property
    def is_pinned(self) -> bool:
        """Whether all of that memory is pinned: copies from other memory do not run beside the computing."""
        return self._stored.is_pinned

    @property
    def is_open(self) -> bool:
        """Whether all layers can be called."""
        return bool(self._slots) or not self.streamed

    def take_to_disk(self, index: int) -> None:
        """Stream a layer from the disk, before the others are arranged; slots are closed."""
        with torch.inference_mode(False), torch.no_grad():
            self._stored.take(index, on_disk=True)

    def arrange(self, streamed: Collection[int], on_disk: Collection[int] = ()) -> None:
        """Stream these layers, by index, and keep all others on the device; slots are closed.

        A layer that is on the device or elsewhere goes through the device on its way, where quantized layers choose
        their kernels; one that comes back takes device memory of its own.

        Args:
            streamed: in ordinary memory, unless they are on the disk.
            on_disk: of these, those that are kept on the disk.

        Raises:
            OSError: the disk is full.
        """
        self.close()
        with torch.inference_mode(False), torch.no_grad():
            self._stored.arrange(streamed, on_disk)

    def open(self) -> None:
        """Allocate the slots, point the streamed layers to them and fill them."""
        if self._slots or not self.streamed:
            return
        if self._stored.on_disk:
            self._reader = ReadAhead(self._stored.on_disk, self._queue, self.disk, pin=self._device.type == "cuda")
        with torch.inference_mode(False), torch.no_grad():
            for layers in shares(self.streamed, self._slot_count):
                size = self._slot_size(layers)
                slot = LayerSlot(torch.empty(size, dtype=torch.uint8, device=self._device), layers)
                self._slots.append(slot)
                for index in layers:
                    self._slot_of[index] = slot
                    self._stored.point_to(index, slot.data)
                self._fill_first(slot)
        for index in self.streamed:
            hook = _StreamingHook(weakref.ref(self), index)
            self._hooks.append(self._layers[index].register_forward_pre_hook(hook.before))
            self._hooks.append(self._layers[index].register_forward_hook(hook.after))

    def close(self) -> None:
        """Give the slots back; the streamed layers' tensors are views of where they are kept until the next `open`."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        if self._reader is not None:
            self._reader.close()
            self._reader = None
        with torch.inference_mode(False), torch.no_grad():
            for slot in self._slots:
                # The copy under way writes to memory that is about to be free.
                self._queue.wait(slot.arrived())
            for index in self._slot_of:
                self._stored.point_home(index)
        self._slot_of.clear()
        self._slots.clear()

    def move(self, module: nn.Module, device: torch.device) -> None:
        """Move a module with these layers: to their own device, and open the slots, or to another, and close them."""
        if device != self._device:
            self.close()
        streamed = self._streamed_parts()
        for part in module.modules():
            if id(part) not in streamed:
                part._apply(lambda tensor: tensor.to(device), recurse=False)
        if device == self._device:
            self.open()

    def resident_bytes(self, module: nn.Module) -> int:
        """Bytes that a module with these layers takes on the device while the slots are open."""
        streamed = self._streamed_parts()
        parts = [part for part in module.modules() if id(part) not in streamed]
        own = [tensor for part in parts for tensor in (*part._parameters.values(), *part._buffers.values())]
        return held_tensor_bytes(own) + self.bytes_when_open

    def before_layer(self, index: int) -> None:
        """Let the device wait for the layer's weights, and the host for a layer that is still being read."""
        slot = self._slot_of[index]
        began = self._queue.now()
        if slot.holds != index:
            self._fill(slot, index)
        self._queue.wait(slot.settle())
        self.stalls.add(index, DISK if index in self._stored.on_disk else BUS, began, self._queue.now())

    def after_layer(self, index: int) -> None:
        """Fill the layer's slot with the one that comes next through it."""
        slot = self._slot_of[index]
        if len(slot.layers) > 1:
            self._fill(slot, slot.after(index))

    def _slot_size(self, layers: tuple[int, ...]) -> int:
        return max(map(self._stored.bytes_of, layers))

    def _streamed_parts(self) -> set[int]:
        return {id(part) for index in self.streamed for part in self._layers[index].modules()}

    def _fill_first(self, slot: LayerSlot) -> None:
        """Fill a slot that was just opened, and measure the bus where that is all it takes."""
        first = slot.layers[0]
        began = time.perf_counter()
        self._fill(slot, first)
        if first not in self._stored.on_disk:
            self._queue.finish(slot.ticket)
            self.bus_rate = self._stored.bytes_of(first) / (time.perf_counter() - began)

    def _fill(self, slot: LayerSlot, index: int) -> None:
        # What was asked of the disk for this slot must not arrive after what comes now.
        slot.settle()
        size = self._stored.bytes_of(index)
        copy = partial(self._queue.copy, slot.data[:size], after=self._queue.mark())
        source = self._stored.in_memory(index)
        if source is not None:
            slot.ticket = copy(source)
        else:
            assert self._reader is not None
            slot.ticket = self._reader.request(index, copy)
        slot.holds = index
        self.copied_bytes += size


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


def start_streaming(
    module: nn.Module, layers: Sequence[nn.Module], device: torch.device, folder: Path | None = None
) -> LayerStreamer:
    """The streamer of a module's layers, which the module keeps; made if it has none.

    Args:
        module: whose layers they are.
        layers: all of them, in the order they are called.
        device: where they compute.
        folder: for layers that are kept on the disk; None for the system's.
    """
    streamer = streamer_of(module)
    if streamer is None:
        streamer = LayerStreamer(layers, device, folder=folder)
        module.__dict__[_ATTRIBUTE] = streamer
    return streamer


def streamer_of(module: nn.Module) -> LayerStreamer | None:
    """The streamer of a module's layers; None if it has none."""
    return module.__dict__.get(_ATTRIBUTE)
