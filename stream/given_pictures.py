"""What a direction's pictures give to each block of a stream."""

from __future__ import annotations

from typing import Any

import torch

from .direction import Direction
from .picture_sources import name_source
from .settings import StreamSettings
from .snapshot import InputVideo
from .start_pictures import GivenStart
from .stream_pipeline import StreamPipeline
from .video_input import VideoReader, VideoUse, check_strength


class GivenPictures:
    """The pictures of one stream: its start, read at once, and its video, read block after block.

    Args:
        direction: of the stream.
        pipeline: says how many pictures a block takes.
        settings: of the stream.

    Raises:
        ValueError: the start or the video has no pictures that can be read.
    """

    def __init__(
        self,
        direction: Direction,
        pipeline: StreamPipeline,
        settings: StreamSettings,
    ) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._direction = direction
        self._start = self._read_start()
        self._video: VideoReader | None = None
        if direction.video is not None:
            self._video = direction.video.open(settings.width, settings.height)
        self._skipped = self._skip_what_was_taken()
        # A video behind a past is encoded as what follows it.
        self._has_past = self._start is not None or direction.go_on is not None

    def _read_start(self) -> GivenStart | None:
        start, settings = self._direction.start, self._settings
        if start is None:
            return None
        return start.read(settings.width, settings.height, most=self._pipeline.context_pictures(settings))

    @property
    def start(self) -> torch.Tensor | None:
        """Pictures to go on from, uint8 [F, height, width, 3]; None where there are none."""
        return None if self._start is None else self._start.pictures

    def show(self, index: int, frames: torch.Tensor) -> torch.Tensor:
        """The pictures of a block, behind those of the start that the video begins with."""
        if self._start is None or index or not len(self._start.shown):
            return frames
        return torch.cat([self._start.shown, frames])

    def of_block(self, index: int, *, cut: bool = False) -> dict[str, Any] | None:
        """Inputs of the pipeline's call for a block; None where the stream ends with its video.

        Args:
            index: of the block in this stream.
            cut: whether it begins afresh.

        Raises:
            ValueError: the strength of this block is not possible.
        """
        if self._video is None or self._direction.video is None:
            return {}
        strength = float(self._direction.video.strength_of(index))
        check_strength(strength)
        # A new scene's first latent frame is one picture.
        from_the_start = (index == 0 and not self._has_past) or cut
        pictures = self._video.next(self._pipeline.input_pictures(self._settings, from_the_start=from_the_start))
        return None if pictures is None else {"input_pictures": pictures, "strength": strength}

    def taken(self) -> InputVideo | None:
        """How far the stream is in its video, for one that goes on from it; None without a video."""
        if self._video is None or self._direction.video is None:
            return None
        return InputVideo(name_source(self._direction.video.source), self._skipped + self._video.use().pictures)

    def _skip_what_was_taken(self) -> int:
        """Leave out what the stream before took of the same video; returns how many pictures that were."""
        before = None if self._direction.go_on is None else self._direction.go_on.input_video
        if before is None or self._video is None or self._direction.video is None:
            return 0
        if before.source != name_source(self._direction.video.source):
            return 0
        self._video.skip(before.pictures)
        return before.pictures

    def use(self) -> VideoUse | None:
        """What was taken of the video; None without one."""
        return None if self._video is None else self._video.use()

    def notices(self) -> list[str]:
        """Sentences on what was done to the pictures."""
        start = [] if self._start is None else list(self._start.notices)
        return start + ([] if self._video is None else self._video.notices())
