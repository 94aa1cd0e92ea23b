"""What a pipeline can do for a stream whose device ran out of memory."""

from __future__ import annotations

from collections.abc import MutableMapping
from typing import Any, Protocol

import torch

from ..memory.way_back import WayBack
from .residency import Residency
from .settings import StreamSettings


class MemorySaving(Protocol):
    """What a memory ladder asks of a pipeline; see `memory_rungs.py`."""

    @property
    def can_make_again(self) -> bool:
        """Whether a block that failed can be made again from the state before it."""

    @property
    def repeats_passes(self) -> bool:
        """Whether passes of the transformer are repeated as a whole, which hooks on its layers would end."""

    def drop_graphs(self, *, for_good: bool = False) -> None:
        """Give back the memory of recorded calls; for good, nothing is recorded in the rest of the stream."""

    def way_back(self, *, ran_out: bool) -> WayBack:
        """What may be kept for making a block again; `ran_out` says whether the stream has run out of memory yet."""

    def offload_other_models(self) -> bool:
        """Move models of others off the device; False when there are none."""

    def offload_unused(self, *, of_text: bool) -> list[str]:
        """Move components off the device that encoding text, or making a block, does without; returns which."""

    def bound_decoding(self, settings: StreamSettings) -> StreamSettings | None:
        """The settings with which decoding takes less memory, for the blocks to come; None when nothing takes less."""

    def stream_more_layers(self, *, of_text: bool) -> bool:
        """Keep fewer layers of transformer, or text encoder, on the device; False when none are left to stream.

        Raises:
            MemoryError: neither RAM nor disk have room for them.
            OSError: the disk is full.
        """

    def pack_keys(self, settings: StreamSettings, values: MutableMapping[str, Any]) -> StreamSettings | None:
        """Keep the past in 8 bits from now on, where the settings left that open, in the state's `values`, too.

        Returns the settings for the blocks to come; None where the keys stay as they are.
        """


class OthersOnly:
    """Of blocks that are not known: what they change in place, and what they call when, is their own business.

    Args:
        residency: of their components.
        device: where they compute.
    """

    can_make_again = False
    repeats_passes = False

    def __init__(self, residency: Residency, device: torch.device) -> None:
        self._residency = residency
        self._device = device

    def drop_graphs(self, *, for_good: bool = False) -> None:
        """Do nothing: there are none."""

    def way_back(self, *, ran_out: bool) -> WayBack:
        """None."""
        return WayBack(on_device=False)

    def offload_other_models(self) -> bool:
        """Those that the residency knows."""
        return self._residency.offload_other_models(self._device)

    def offload_unused(self, *, of_text: bool) -> list[str]:
        """Return nothing."""
        return []

    def bound_decoding(self, settings: StreamSettings) -> StreamSettings | None:
        """Return None."""
        return None

    def stream_more_layers(self, *, of_text: bool) -> bool:
        """Return False."""
        return False

    def pack_keys(self, settings: StreamSettings, values: MutableMapping[str, Any]) -> StreamSettings | None:
        """Return None."""
        return None
