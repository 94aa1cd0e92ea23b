"""What a clean-up gave back."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .byte_text import format_bytes
from .cleanup import read_card_memory
from .tensor_bytes import live_tensor_bytes


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

    def freed_to(self, after: DeviceMemory) -> str:
        """What was freed between this moment and `after`, in words."""
        tensors = f"{format_bytes(max(self.tensors - after.tensors, 0))} of tensors"
        if self.reserved is None or after.reserved is None:
            left = format_bytes(after.tensors)
            return f"Freed {tensors} on {self.device}, {left} left"
        given = format_bytes(max(self.reserved - after.reserved, 0))
        left = format_bytes(after.reserved)
        return f"Freed {tensors}; {given} went back to {self.device}, torch keeps {left}"


def read_device_memory(device: torch.device) -> DeviceMemory:
    """Bytes on `device`; without counters all live tensors are counted, which takes some 0.3 seconds."""
    card = read_card_memory(device)
    if card is None:
        return DeviceMemory(str(device), live_tensor_bytes(device.type))
    return DeviceMemory(str(device), card.allocated, card.reserved)
