"""What a clean-up gave back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .cleanup import read_card_memory
from .tensor_bytes import live_tensor_bytes


@dataclass(frozen=True)
class FreedMemory:
    """Bytes freed on a device.

    Attributes:
        device: such as "cuda:0".
        tensors: of tensors that are gone.
        left: still held by torch's allocator, or by tensors where it has no counter.
        returned: given back to the device by torch's allocator; None where there is no such counter.
    """

    device: str
    tensors: int
    left: int
    returned: int | None = None


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes on a device at one moment.

    Attributes:
        device: such as "cuda:0".
        tensors: in use by tensors.
        reserved: held by torch's allocator, in use or cached; None where there is no such counter.
    """

    device: str
    tensors: int
    reserved: int | None = None

    def freed_to(self, after: DeviceMemory) -> FreedMemory:
        """What was freed between this moment and `after`."""
        tensors = max(self.tensors - after.tensors, 0)
        if self.reserved is None or after.reserved is None:
            return FreedMemory(self.device, tensors, after.tensors)
        return FreedMemory(self.device, tensors, after.reserved, max(self.reserved - after.reserved, 0))


def read_device_memory(device: torch.device) -> DeviceMemory:
    """Bytes on `device`; without counters all live tensors are counted, which takes some 0.3 seconds."""
    card = read_card_memory(device)
    if card is None:
        return DeviceMemory(str(device), live_tensor_bytes(device.type))
    return DeviceMemory(str(device), card.allocated, card.reserved)
