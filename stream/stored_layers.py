"""The streamed layers of a module, each packed in one piece: in ordinary memory, or on the disk for want of it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch
from torch import nn

from .copy_queue import HostBlock
from .packed_layers import PackedLayer
from .scratch_disk import DiskBlock, usual_folders


class StoredLayers:
    """Takes layers off their device and brings them back.

    Args:
        layers: all of the module's repeated layers.
        device: where they compute.
        folder: for the layers on the disk; None for the system's folder for temporary files.
    """

    def __init__(self, layers: Sequence[nn.Module], device: torch.device, folder: Path | None = None) -> None:
        self._layers = list(layers)
        self._device = device
        self._folder = folder or usual_folders()[0]
        self._packed: dict[int, PackedLayer] = {}
        self._hosts: dict[int, HostBlock] = {}
        self._disks: dict[int, DiskBlock] = {}

    @property
    def indices(self) -> tuple[int, ...]:
        """Of the layers that are stored."""
        return tuple(sorted(self._packed))

    @property
    def on_disk(self) -> Mapping[int, DiskBlock]:
        """Those of them that are on the disk."""
        return self._disks

    @property
    def host_bytes(self) -> int:
        """Bytes of the others, in ordinary memory."""
        return sum(block.data.numel() for block in self._hosts.values())

    @property
    def disk_bytes(self) -> int:
        """Bytes of those on the disk."""
        return sum(block.size for block in self._disks.values())

    @property
    def is_pinned(self) -> bool:
        """Whether all of that memory is pinned."""
        return all(block.pinned for block in self._hosts.values())

    def bytes_of(self, index: int) -> int:
        """Bytes of a stored layer."""
        return self._packed[index].bytes

    def in_memory(self, index: int) -> torch.Tensor | None:
        """A layer's bytes, uint8; None for one on the disk."""
        block = self._hosts.get(index)
        return None if block is None else block.data

    def point_to(self, index: int, data: torch.Tensor) -> None:
        """Make a layer's tensors views of `data`, uint8 [at least its bytes]."""
        self._packed[index].point_to(data)

    def point_home(self, index: int) -> None:
        """Make a layer's tensors views of where it is stored: one on the disk is read where it is looked at."""
        block = self._hosts.get(index)
        self._packed[index].point_to(self._disks[index].mapped() if block is None else block.data)

    def arrange(self, stored: Collection[int], on_disk: Collection[int]) -> None:
        """Store these layers, by index, the second ones on the disk, and have all others on the device.

        Memory is given back before more is taken. Raises OSError when the disk is full.
        """
        for index in sorted(set(self._packed) - set(stored)):
            self._bring_back(index)
        for index in sorted(set(self._hosts) & set(on_disk)):
            self._to_disk(index)
        for index in sorted(set(self._disks) & set(stored) - set(on_disk)):
            self._to_memory(index)
        for index in sorted(set(stored) - set(self._packed)):
            self.take(index, on_disk=index in on_disk)

    def take(self, index: int, *, on_disk: bool) -> None:
        """Store a layer; it goes through the device, where quantized layers choose their kernels."""
        layer = self._layers[index]
        layer.to(self._device)
        packed = PackedLayer(layer)
        block = HostBlock(packed.bytes, pin=not on_disk and self._device.type == "cuda")
        packed.copy_to(block.data)
        if on_disk:
            self._disks[index] = DiskBlock(block.data, self._folder)
        else:
            self._hosts[index] = block
        self._packed[index] = packed
        self.point_home(index)

    def _bring_back(self, index: int) -> None:
        """One that comes back takes device memory of its own."""
        held = self.in_memory(index)
        own = (self._disks[index].mapped() if held is None else held).to(self._device, copy=True)
        self._packed.pop(index).point_to(own)
        (self._disks if held is None else self._hosts).pop(index).release()

    def _to_disk(self, index: int) -> None:
        self._disks[index] = DiskBlock(self._hosts[index].data, self._folder)
        host = self._hosts.pop(index)
        self.point_home(index)
        host.release()

    def _to_memory(self, index: int) -> None:
        disk = self._disks.pop(index)
        block = HostBlock(disk.size, pin=self._device.type == "cuda")
        disk.read_into(block.data)
        self._hosts[index] = block
        self.point_home(index)
        disk.release()
