"""Decoded pictures on their way to the CPU, and to whoever wants to see them before their block is whole."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

# Called with pictures of a block in their order, uint8 [F, height, width, 3] on the CPU and not to be written to, the
# place of the first of them in the block, and how many pictures the whole block has.
ShowPictures = Callable[[torch.Tensor, int, int], None]


@dataclass(frozen=True)
class _Arriving:
    """Pictures that are being copied: where to, whether they are finite, and when both are there."""

    pictures: torch.Tensor
    finite: torch.Tensor
    there: torch.cuda.Event | None


class HostPictures:
    """The pictures of one block, copied as they are decoded.

    On CUDA they go through pinned memory, each copy queued behind the decoding of its pictures; the host waits once,
    at the end. Whoever is shown pictures gets them when their copy is done: the host looks whether one is each time
    that it has queued more work, and at the end waits for one after the other in the place of all at once.

    Args:
        of: how many pictures the block has.
        show: is given pictures that are finite; None where nobody looks.
    """

    def __init__(self, of: int, show: ShowPictures | None = None) -> None:
        self._of = of
        self._show = show
        self._shown = 0
        self._copies: list[torch.Tensor] = []
        self._finite: list[torch.Tensor] = []
        self._arriving: deque[_Arriving] = deque()

    def add(self, pixels: torch.Tensor) -> None:
        """Take the next pixels, [1, 3, F, height, width] in -1..1, on the decoder's device."""
        finite = torch.isfinite(pixels).all()
        self._finite.append(finite)
        copied = _copy_in_order(to_uint8_pictures(pixels))
        self._copies.append(copied)
        if self._show is not None:
            flag = _copy_in_order(finite)
            there = torch.cuda.current_stream(pixels.device).record_event() if pixels.is_cuda else None
            self._arriving.append(_Arriving(copied, flag, there))
            self._show_those_there()

    def take(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All pictures, uint8 [1, F, height, width, 3] on the CPU, and whether all were finite, on their own device."""
        finite = torch.stack(self._finite).all()
        self._show_those_there(wait=True)
        if finite.is_cuda:
            torch.cuda.current_stream(finite.device).synchronize()
        # Sinks may keep pictures for long: joined, they are in pageable memory, and pinned memory returns to its pool.
        return torch.cat(self._copies, dim=1), finite

    def _show_those_there(self, *, wait: bool = False) -> None:
        while self._show is not None and self._arriving:
            first = self._arriving[0]
            if first.there is not None:
                if not wait and not first.there.query():
                    return
                first.there.synchronize()
            self._arriving.popleft()
            shown = first.pictures[0]
            if first.finite:
                self._show(shown.clone() if first.there is not None else shown, self._shown, self._of)
            self._shown += len(shown)


def to_uint8_pictures(pixels: torch.Tensor) -> torch.Tensor:
    """From [batch, 3, F, height, width] in -1..1 to uint8 [batch, F, height, width, 3], on the same device."""
    scaled = pixels.float().add(1.0).mul_(127.5).round_().clamp_(0, 255).to(torch.uint8)
    return scaled.permute(0, 2, 3, 4, 1).contiguous()


def _copy_in_order(tensor: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU; from CUDA it is there once the device has done what is queued so far."""
    if tensor.device.type != "cuda":
        return tensor.cpu()
    staging = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return staging.copy_(tensor, non_blocking=True)
