"""What may be kept so that a block which runs out of memory can be made again."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class WayBack:
    """Where the large values that a block overwrites may be kept until it is made.

    Attributes:
        on_device: whether they may stay where they are, beside the new ones.
        ram_bytes: otherwise, how much RAM their copies may take; with 0 there is no way back to them.
    """

    on_device: bool = True
    ram_bytes: int = 0


FREE_WAY_BACK = WayBack()
