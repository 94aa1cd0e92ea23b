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
        first: pictures of the stream's first block.
        others: pictures of every other block.
        fps: pictures a second.
        afresh: pictures of a block behind a cut, as of the first one of a new stream.
    """

    first: int
    others: int
    fps: float
    afresh: int

    @classmethod
    def of(cls, geometry: LatentGeometry, frames_per_block: int, fps: float, *, goes_on: bool = False) -> BlockClock:
        """The clock of a stream; `goes_on` is one whose first block continues another stream."""
        afresh, others = (geometry.pixel_frames(frames_per_block, from_the_start=start) for start in (True, False))
        return cls(others if goes_on else afresh, others, fps, afresh)

    def blocks_for(self, seconds: float, fresh: Sequence[int] = ()) -> int:
        """As many blocks as it takes to show at least so many seconds; 1 or more.

        Args:
            seconds: of all pictures.
            fresh: blocks behind a cut, ascending and above 0; they have fewer pictures.
        """
        # A picture's worth of rounding is no block more.
        pictures = math.ceil(seconds * self.fps - 1e-6)
        begin, before, first = self._scene_at(pictures - 1, fresh)
        return begin + 1 + max(0, math.ceil((pictures - before - first) / self.others))

    def nearest_block(self, seconds: float, fresh: Sequence[int] = ()) -> int:
        """The block that begins nearest to a time.

        Args:
            seconds: since the first picture.
            fresh: blocks behind a cut, ascending and above 0.
        """
        begin, before, first = self._scene_at(seconds * self.fps, fresh)
        pictures = seconds * self.fps - before
        if pictures < first / 2:
            return begin
        return begin + 1 + max(0, math.floor((pictures - first) / self.others + 0.5))

    def _scene_at(self, picture: float, fresh: Sequence[int]) -> tuple[int, int, int]:
        """The scene that a picture is in: its first block, pictures before it, pictures of its first block."""
        begin, before, first = 0, 0, self.first
        for block in fresh:
            start = before + first + (block - begin - 1) * self.others
            if start > picture:
                break
            begin, before, first = block, start, self.afresh
        return begin, before, first
