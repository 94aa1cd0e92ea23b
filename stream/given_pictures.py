"""What a direction's pictures give to each block of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from .direction import Direction
from .live_video import LiveReader
from .settings import StreamSettings
from .snapshot import InputVideo
from .start_pictures import GivenStart
from .stream_pipeline import StreamPipeline
from .video_input import VideoReader, VideoUse, check_strength


class GivenPictures:
    """The pictures of one stream: its start, read at once, and its video, read block after block, or pushed by pages.

    Args:
        direction: of the stream.
        pipeline: says how many pictures a block takes.
        settings: of the stream.
        made: pictures of blocks that an earlier part of the very stream has made.

    Attributes:
        made: pictures of finished blocks.

    Raises:
        ValueError: the start or the video has no pictures that can be read.
    """

    def __init__(
        self,
        direction: Direction,
        pipeline: StreamPipeline,
        settings: StreamSettings,
        *,
        made: int = 0,
    ) -> None:
        self._pipeline = pipeline
        self._settings = settings
        self._direction = direction
        self._start = self._read_start()
        self._video: VideoReader | LiveReader | None = None
        # Asked now: at the stream's end the file may be gone.
        self._named = ""
        self.made = made
        self._resumed = made > 0
        if direction.video is not None:
            self._video = direction.video.open(settings.width, settings.height)
            self._named = direction.video.identity()
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
        """The pictures of a finished block, behind those of the start that the video begins with."""
        self.made += len(frames)
        if self._start is None or index or not len(self._start.shown):
            return frames
        return torch.cat([self._start.shown, frames])

    def of_block(self, index: int, strength: float | None, *, cut: bool = False) -> dict[str, Any] | None:
        """Inputs of the pipeline's call for a block; None where the stream ends with its video.

        Args:
            index: of the block in this stream.
            strength: how much of the video is replaced, 0..1; None without one.
            cut: whether it begins afresh.

        Raises:
            ValueError: the strength of this block is not possible, or the stream before took all of the video.
        """
        if self._video is None or strength is None:
            return {}
        check_strength(strength)
        # A new scene's first latent frame is one picture. At block 0 only an earlier stream can be cut off.
        cut = cut and (index > 0 or self._direction.go_on is not None)
        from_the_start = (index == 0 and not self._has_past) or cut
        pictures = self._video.next(self._pipeline.input_pictures(self._settings, from_the_start=from_the_start))
        if pictures is None and index == 0:
            raise ValueError(
                f"video has ended: the stream of go_on_from took all of its pictures ({self._skipped}); choose another "
                "video_end than 'stop', connect another video, or disconnect it."
            )
        return None if pictures is None else {"input_pictures": pictures, "strength": strength}

    def again(self, inputs: Mapping[str, Any], strength: float | None) -> dict[str, Any]:
        """Inputs of a block that is begun again, with the pictures that it has.

        Args:
            inputs: as `of_block` gave them.
            strength: of the block now.

        Raises:
            ValueError: the strength is not possible.
        """
        if strength is None or "strength" not in inputs:
            return dict(inputs)
        check_strength(strength)
        return {**inputs, "strength": strength}

    def taken(self) -> InputVideo | None:
        """How far the stream is in its video, for one that goes on from it; None without a video."""
        if self._video is None:
            return None
        taken = self._skipped + self._video.use().pictures
        return InputVideo(self._named, taken, float(self._video.input.fps))

    def _skip_what_was_taken(self) -> int:
        """Leave out what the stream before took of the same video; returns how many pictures that were."""
        before = None if self._direction.go_on is None else self._direction.go_on.input_video
        if self._resumed and (before is None) != (self._video is None):
            raise ValueError(
                "resume: the unfinished stream was made "
                + ("without a video: disconnect it" if before is None else "from a video: connect it")
                + " or choose 'new stream'."
            )
        if self._video is None or before is None:
            return 0
        if before.source != self._named:
            if self._resumed:
                raise ValueError(
                    "resume: the video is another one than the unfinished stream was made from: connect that one, or "
                    "choose 'new stream'."
                )
            return 0
        skipped = before.pictures
        if self._video.has_rate:
            # The same seconds, where the stream now shows more or fewer pictures of them.
            skipped = round(skipped * float(self._video.input.fps) / before.fps)
        self._video.skip(skipped)
        return skipped

    def use(self) -> VideoUse | None:
        """What was taken of the video for finished blocks; None without one."""
        return None if self._video is None else replace(self._video.use(), pictures=self.made)

    def notices(self) -> list[str]:
        """Sentences on what was done to the pictures."""
        start = [] if self._start is None else list(self._start.notices)
        return start + ([] if self._video is None else self._video.notices())
