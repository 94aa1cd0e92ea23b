"""Which block shows which second."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from ..families.model_family import LatentGeometry


@dataclass(frozen=True)
class BlockClock:
    """How many pictures blocks have, and how fast they pass.

    Attributes:
        first: pictures of a block that begins afresh: the stream's first one, or one behind a cut.
        others: pictures of every other block.
        fps: pictures a second.
    """

    first: int
    others: int
    fps: float

    @classmethod
    def of(cls, geometry: LatentGeometry, frames_per_block: int, fps: float, *, goes_on: bool = False) -> BlockClock:
        """The clock of a stream; `goes_on` is one whose first block continues another stream."""
        others = geometry.pixel_frames(frames_per_block, from_the_start=False)
        return cls(others if goes_on else geometry.pixel_frames(frames_per_block, from_the_start=True), others, fps)

    def blocks_for(self, seconds: float) -> int:
        """As many blocks as it takes to show at least so many seconds; 1 or more."""
        # A picture's worth of rounding is no block more.
        missing = math.ceil(seconds * self.fps - 1e-6) - self.first
        return 1 + max(0, math.ceil(missing / self.others))

    def nearest_block(self, seconds: float, fresh: Sequence[int] = ()) -> int:
        """The block that begins nearest to a time.

        Args:
            seconds: since the first picture.
            fresh: blocks behind a cut, ascending.
        """
        pictures = seconds * self.fps
        after, before = 0, 0
        for block in fresh:
            start = before + self._pictures(block - after)
            if start > pictures:
                break
            after, before = block, start
        pictures -= before
        if pictures < self.first / 2:
            return after
        return after + 1 + max(0, math.floor((pictures - self.first) / self.others + 0.5))

    def _pictures(self, blocks: int) -> int:
        """Pictures of so many blocks, of which the first begins afresh."""
        return 0 if blocks == 0 else self.first + (blocks - 1) * self.others
