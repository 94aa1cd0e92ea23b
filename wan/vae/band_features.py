"""What the decoder's convolutions keep of past frames, where it works a band at a time or where that lies in RAM."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.nn import functional as F

from .decoder_stages import Band
from .norm_silu import PAST_FRAMES
from .residual_blocks import Features

_META = torch.device("meta")
# Asked of a feature, by identity.
IsHeld = Callable[[object], bool]


def never_held(feature: object) -> bool:
    """Where features are the decoder's alone."""
    return False


class BandFeatures:
    """Stands for diffusers' list of features while one stage of the decoder, or all of it, works band after band.

    The features stay those of whole pictures, overwritten in place. A band reads its own rows and the halo; the rows of
    its past that the next band needs too are put aside before they are overwritten. A first frame is kept as the second
    of two, after a frame of zeros: that is what a convolution pads with.

    Args:
        features: diffusers' list; its entries are changed.
        rows: of the stage's input; features have as many or a multiple.
        device: where the decoder works.
        in_ram: whether features are kept in RAM (pinned for CUDA) and fetched one by one, when they are read.
        is_held: whether a feature is kept by somebody else; such a one is replaced, not overwritten.
    """

    def __init__(
        self,
        features: Features,
        rows: int,
        device: torch.device,
        *,
        in_ram: bool,
        is_held: IsHeld = never_held,
    ) -> None:
        self._features = features
        self._before = list(features)
        self._rows = rows
        self._device = device
        self._in_ram = in_ram
        self._is_held = is_held
        self._band = Band(0, 0, rows, rows)
        self._next: Band | None = None
        self._aside: dict[int, torch.Tensor] = {}
        self._fetched: dict[int, torch.Tensor] = {}

    def begin(self, band: Band, following: Band | None) -> None:
        """Turn to `band`, from top to bottom; `following` is the one after it."""
        self._band, self._next = band, following

    def __getitem__(self, index: int) -> torch.Tensor | str | None:
        """The band's rows of a feature, [batch, channels, frames, rows, width], on the decoder's device."""
        before = self._before[index]
        if not isinstance(before, torch.Tensor):
            return before
        if index not in self._fetched:
            self._fetched[index] = self._read(index, before)
        return self._fetched[index]

    def __setitem__(self, index: int, value: torch.Tensor | str | None) -> None:
        """Keep the rows of `value`, that of the band with its halo, that are the band's own."""
        if not isinstance(value, torch.Tensor):
            self._features[index] = value
            return
        band, before = self._band, self[index]
        scale = value.shape[3] // (band.bottom - band.top)
        if band.start == 0 and not self._can_overwrite(self._before[index], value):
            self._features[index] = self._allocate(value, self._rows * scale)
        kept = self._features[index]
        assert isinstance(kept, torch.Tensor)
        if kept is self._before[index] and isinstance(before, torch.Tensor) and self._next is not None:
            shared = slice((self._next.top - band.top) * scale, (band.stop - band.top) * scale)
            self._aside[index] = before[:, :, :, shared].clone()
        self._fetched.pop(index, None)
        own = value[:, :, :, (band.start - band.top) * scale : (band.stop - band.top) * scale]
        own = F.pad(own, (0, 0, 0, 0, PAST_FRAMES - own.shape[2], 0)) if own.shape[2] < PAST_FRAMES else own
        _copy(_rows_first(own), _rows_first(kept)[band.start * scale : band.stop * scale])

    def _read(self, index: int, before: torch.Tensor) -> torch.Tensor:
        scale = before.shape[3] // self._rows
        aside = self._aside.pop(index, None)
        top = self._band.top if aside is None else self._band.start
        rows = before[:, :, :, top * scale : self._band.bottom * scale]
        if rows.device != self._device or self._in_ram:
            # Allocated first: on the meta device, too, the copy is counted.
            fetched = torch.empty(_rows_first(rows).shape, dtype=rows.dtype, device=self._device)
            _copy(_rows_first(rows), fetched)
            rows = _from_rows_first(fetched)
        return rows if aside is None else torch.cat([aside, rows], dim=3)

    def _can_overwrite(self, before: torch.Tensor | str | None, value: torch.Tensor) -> bool:
        home = self._home()
        return (
            isinstance(before, torch.Tensor)
            and before.shape[2] == PAST_FRAMES
            and before.dtype == value.dtype
            and before.device == home
            and not self._is_held(before)
            and (torch.is_inference_mode_enabled() or not before.is_inference())
        )

    def _home(self) -> torch.device:
        return torch.device("cpu") if self._in_ram and self._device != _META else self._device

    def _allocate(self, value: torch.Tensor, rows: int) -> torch.Tensor:
        """Of whole pictures; a row's values lie together, so that a band is copied in one piece."""
        batch, channels, _, _, width = value.shape
        shape = (rows, batch, PAST_FRAMES, width, channels)
        if self._in_ram and self._device == _META:
            # RAM is not counted in a rehearsal.
            return _from_rows_first(torch.empty((1,) * 5, dtype=value.dtype, device=_META).expand(shape))
        pinned = self._in_ram and self._device.type == "cuda"
        kept = torch.empty(shape, dtype=value.dtype, device=self._home(), pin_memory=pinned)
        return _from_rows_first(kept)


def _rows_first(feature: torch.Tensor) -> torch.Tensor:
    """[batch, channels, frames, rows, width] as [rows, batch, frames, width, channels], in the same memory."""
    return feature.permute(3, 0, 2, 4, 1)


def _from_rows_first(feature: torch.Tensor) -> torch.Tensor:
    """The inverse of `_rows_first`."""
    return feature.permute(1, 4, 2, 0, 3)


def _copy(source: torch.Tensor, target: torch.Tensor) -> None:
    if source.device != target.device:
        # Of one layout, or the copy would go through another in RAM.
        source = source.contiguous()
    # All copies of a feature are in one CUDA stream's order, so the host waits for none; other devices give no such
    # promise.
    target.copy_(source, non_blocking="cuda" in (source.device.type, target.device.type))
