"""What the VAE's causal convolutions had kept before a block, for a block that runs out of memory on the way."""

from __future__ import annotations

import torch

from ...memory.way_back import WayBack
from .residual_blocks import Features


class KeptFeatures:
    """A way back to features that are about to be replaced or overwritten.

    A reference is free until the first feature is replaced, and then costs as much as was replaced. A copy in RAM costs
    its time on the bus, in the order of the device's own work, and no memory of the device.

    Args:
        features: diffusers' list, before the block.
        way: what may be taken for it.
    """

    def __init__(self, features: Features, way: WayBack) -> None:
        tensors = [feature for feature in features if isinstance(feature, torch.Tensor)]
        self._device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        self._kept: Features | None = None
        if way.on_device or sum(tensor.nbytes for tensor in tensors) <= way.ram_bytes:
            self._kept = list(features) if way.on_device else [keep_in_ram(feature) for feature in features]

    def is_held(self, feature: object) -> bool:
        """Whether this very tensor is kept, and so must not be overwritten."""
        return self._kept is not None and any(feature is kept for kept in self._kept)

    def restore(self, features: Features) -> bool:
        """Make the list what it was; False where nothing was kept."""
        if self._kept is None:
            return False
        # One by one: what is replaced makes room for what comes back.
        for index, kept in enumerate(self._kept):
            features[index] = None
            features[index] = kept.to(self._device) if isinstance(kept, torch.Tensor) else kept
        return True

    def let_go(self) -> None:
        """Give the memory back: there is no way back any more."""
        self._kept = None


def keep_in_ram(feature: torch.Tensor | str | None) -> torch.Tensor | str | None:
    """A copy, pinned for CUDA, for features of a device; those that lie in RAM are not copied."""
    if not isinstance(feature, torch.Tensor) or feature.device.type == "cpu":
        return feature
    copied = torch.empty_like(feature, device="cpu", pin_memory=feature.device.type == "cuda")
    # In the order of the CUDA stream, before anything can overwrite the feature.
    return copied.copy_(feature, non_blocking=feature.device.type == "cuda")
