"""Room on the device that streamed layers pass through."""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass

import torch

SLOTS = 3


@dataclass
class LayerSlot:
    """Room for one layer on the device.

    Attributes:
        data: uint8, as large as its largest layer.
        layers: that pass through it, by index, in order.
        holds: which of them it holds, or will hold when the copy under way is done.
        ticket: of that copy, or the promise of one when the layer has been read from the disk.
    """

    data: torch.Tensor
    layers: tuple[int, ...]
    holds: int | None = None
    ticket: object = None

    def after(self, layer: int) -> int:
        """The layer that comes after `layer`, the first one after the last."""
        place = self.layers.index(layer) + 1
        return self.layers[place % len(self.layers)]

    def settle(self) -> object:
        """The ticket, once there is one; raises OSError when the disk failed."""
        if isinstance(self.ticket, Future):
            self.ticket = self.ticket.result()
        return self.ticket

    def arrived(self) -> object:
        """The ticket of a copy under way; None where there is none, or the disk failed or was never asked."""
        if not isinstance(self.ticket, Future):
            return self.ticket
        return self.ticket.result() if self.ticket.done() and self.ticket.exception() is None else None


def shares(streamed: tuple[int, ...], slots: int = SLOTS) -> list[tuple[int, ...]]:
    """Which of the streamed layers go through each slot, by turns."""
    return [streamed[first::slots] for first in range(min(slots, len(streamed)))]


def copied_each_pass(streamed: tuple[int, ...]) -> tuple[int, ...]:
    """Those of the streamed layers that are copied in each pass: a layer alone in its slot stays there."""
    return tuple(index for layers in shares(streamed) if len(layers) > 1 for index in layers)
