"""Points for the memory chart on the sampler's node."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from ..memory.readings import card_bytes
from ..memory.timeline import BLOCK_END, StageRecord

# Limits the messages to the page: a fast stream has hundreds of stages a second.
_SECONDS_BETWEEN = 0.1


class MemoryChart:
    """Turns records into points and sends them: the end of every block, other stages at most ten times a second.

    Args:
        blocks: how many the stream will have; None for one without end.
        device: of the stream.
        send: takes a point as JSON values.
    """

    def __init__(self, blocks: int | None, device: torch.device, send: Callable[[Mapping[str, Any]], object]) -> None:
        self._blocks = blocks
        self._card = card_bytes(device)
        self._send = send
        self._first = True
        self._sent_at = 0.0
        self._peak = 0

    def __call__(self, record: StageRecord) -> None:
        """Send the record, unless the last one was sent too recently."""
        reading = record.reading
        self._peak = max(self._peak, reading.allocated if reading.peak is None else reading.peak)
        now = time.monotonic()
        if record.stage != BLOCK_END and now - self._sent_at < _SECONDS_BETWEEN:
            return
        self._sent_at = now
        self._send(
            {
                # Tells the page to start a new curve.
                "first": self._first,
                "stage": record.stage,
                "block": record.block,
                "blocks": self._blocks,
                "allocated": reading.allocated,
                # The peak of all stages since the last point, including those not sent.
                "peak": self._peak,
                "card": self._card,
                "owners": [[owner.label, owner.bytes] for owner in record.owners],
                "event": record.event,
            }
        )
        self._first, self._peak = False, 0
