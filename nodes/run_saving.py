"""Where one run of the sampler is saved while it goes on, and the saved run that it resumes. Imports diffusers."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from pathlib import Path
from secrets import token_hex
from typing import Any

from .. import host
from ..stream.direction import Direction
from ..stream.going_on import check_recipe
from ..stream.growing_mp4 import check_fragments
from ..stream.prompt_track import PromptTrack
from ..stream.recipe import Recipe
from ..stream.run_point import RunPoint
from ..stream.saved_folder import SavedFolder, saved_folders
from ..stream.settings import StreamSettings
from ..stream.sinks import Mp4Sink
from ..stream.snapshot import StreamSnapshot
from ..stream.stream_saver import StreamSaver
from .asked_stream import difference
from .saved_streams import PLACE, UNFINISHED

logger = logging.getLogger(__name__)

# In ComfyUI's output folder, which outlasts a restart.
UNFINISHED_STREAMS = f"{PLACE}/{UNFINISHED}"
# Chosen by the memory that was free: another choice gives the same pictures but for rounding.
_BY_MEMORY = ("fuse_context", "decode_bands", "decoder_cache_in_ram")


class RunSaving:
    """The saving of one run.

    Args:
        every: blocks between two saves; 0 saves nothing.
        resume: whether the last unfinished run of this node goes on.
        recipe: of the pipeline.
        keep_all: whether all pictures are to be kept.
        node: the node's execution id; None outside of a prompt.
        workflow: the page's id of the workflow; None outside of a page.
        asked: of `asked_of`, by which prompts without a workflow are told apart.
        extra: the hidden input with the workflow; None outside of a prompt.

    Attributes:
        point: where the run that is resumed stood; None for a new one.
        past: the snapshot that it goes on from.
        notices: sentences for the user.

    Raises:
        ValueError: there is a run to resume, and it cannot go on with this pipeline, or its snapshots are damaged.
        OSError: its video is gone or another one.
    """

    def __init__(
        self,
        every: int,
        recipe: Recipe,
        *,
        resume: bool,
        keep_all: bool,
        node: str | None,
        workflow: str | None,
        asked: str,
        extra: Any,  # noqa: ANN401
    ) -> None:
        self.notices: list[str] = []
        self.point: RunPoint | None = None
        self.past: StreamSnapshot | None = None
        self._every = every
        self._node, self._workflow = node or "", workflow or ""
        self._asked = asked
        self._extra = extra
        self._folder: SavedFolder | None = None
        self._growing: Path | None = None
        if resume:
            self._find(recipe, keep_all)

    def settings(self, asked: StreamSettings) -> StreamSettings:
        """`asked` for the run that is resumed: what the memory decided then stays decided, as far as it fits."""
        if self.past is None:
            return asked
        known = self.past.settings
        return replace(asked, seed=known.seed, **{name: getattr(known, name) for name in _BY_MEMORY})

    def direction(self, planned: Direction) -> Direction:
        """What the run that is resumed followed, in the place of what is planned; its start is behind it."""
        if self.point is None:
            return planned
        point = self.point
        track = PromptTrack.parse(point.track, point.interpolation).place(None, None) if point.track else None
        return Direction.of(
            planned.prompt_of(0) if track is None and planned.embeds is None else "",  # type: ignore[arg-type]
            planned.embeds,
            track,
            self.past,
            None,
            planned.video,
        )

    def sink(self, fps: float, earlier: Path | None) -> Mp4Sink:
        """The sink of the run's video: beside its snapshots, where it is saved; else in the temp folder."""
        finished = host.new_temp_file("streamblocks", ".mp4")
        if self._folder is not None and self.point is not None:
            self._growing = self._folder.video
            return Mp4Sink(self._growing, fps=fps, finish_at=finished, resume=self.point.video)
        self._folder = self._new_folder() if self._every else None
        if self._folder is not None:
            self._growing = self._folder.video
            return Mp4Sink(self._growing, fps=fps, finish_at=finished, begin_with=earlier)
        return Mp4Sink(finished, fps=fps, begin_with=earlier)

    def saver(self, video: Mp4Sink) -> StreamSaver | None:
        """What saves the run; None where nothing is saved."""
        if self._folder is None or not self._every:
            return None
        return StreamSaver(
            self._folder, self._every, video, node=self._node, workflow=self._workflow, asked=self._asked
        )

    def is_growing(self, video: Mp4Sink) -> bool:
        """Whether the file of `video` is the one beside the snapshots, which stays where it is."""
        return video.path == self._growing

    def blocks_to_go_on_behind(self) -> int:
        """Of the newest snapshot; 0 where there is none."""
        point = None if self._folder is None else self._folder.point()
        return 0 if point is None else point.blocks

    def run_finished(self, video: Mp4Sink) -> None:
        """Remove what was saved: the video is where finished ones go."""
        if self._folder is None:
            return
        if self.is_growing(video):
            # It could not be written as a plain mp4.
            self._folder.discard_snapshots()
        else:
            self._folder.discard()

    def run_failed(self, video: Mp4Sink) -> None:
        """Remove what nothing could be resumed from."""
        if self._folder is not None and not self.is_growing(video) and self._folder.point() is None:
            self._folder.discard()

    def release(self) -> None:
        """The run is over: others may go on with what is left of it."""
        if self._folder is not None:
            self._folder.release()

    def _new_folder(self) -> SavedFolder | None:
        """A folder that the first block makes: a stream that made none leaves nothing."""
        workflow = (self._extra or {}).get("workflow")
        try:
            # Two servers may have one output folder.
            name = f"{time.strftime('%Y-%m-%d_%H-%M-%S')}_{token_hex(2)}"
            folder = SavedFolder(host.output_folder() / UNFINISHED_STREAMS / name, workflow)
            folder.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            logger.warning("the stream is not saved: %s", error)
            self.notices.append(f"The stream was not saved while it ran, because no folder could be made ({error}).")
            return None
        return folder

    def _find(self, recipe: Recipe, keep_all: bool) -> None:
        other = ""
        for folder in saved_folders(host.output_folder() / UNFINISHED_STREAMS):
            point = folder.point()
            if point is None or (point.node, point.workflow) != (self._node, self._workflow):
                continue
            # Without a workflow, a node's id is that of any prompt.
            differs = "" if self._workflow else difference(point.asked, self._asked)
            if differs:
                # The newest one of those that are others.
                other = other or (
                    f"resume: the unfinished stream in {folder.path} is another one ({differs}): it was left as it is."
                )
            elif not folder.claim():
                self.notices.append(
                    f"resume: the unfinished stream in {folder.path} runs now, in this ComfyUI or another one that has "
                    "the same output folder: it was left to it."
                )
            else:
                self._take_or_leave(folder, recipe, keep_all)
                return
        self.notices += [other] if other else []

    def _take_or_leave(self, folder: SavedFolder, recipe: Recipe, keep_all: bool) -> None:
        try:
            self._take(folder, recipe, keep_all)
        except BaseException:
            # A kept error keeps the folder alive.
            folder.release()
            raise

    def _take(self, folder: SavedFolder, recipe: Recipe, keep_all: bool) -> None:
        saved, said = folder.load()
        self._folder, self.past, self.point = folder, saved.snapshot, saved.point
        point = saved.point
        if point is None:
            raise ValueError(f"{folder.path} holds no run that can be resumed: choose it in Load Saved Stream.")
        try:
            check_recipe(saved.snapshot, recipe)
        except ValueError as error:
            raise ValueError(
                f"resume: the unfinished stream in {folder.path} cannot go on with these inputs ({error}); or choose "
                "'new stream' to leave it as it is."
            ) from error
        check_fragments(folder.video, point.video.fragments, point.video.bytes)
        self.notices += said
        self.notices.append(
            f"The stream went on behind block {point.blocks} from {folder.path}, with the prompts that it had."
        )
        if keep_all:
            self.notices.append("keep_frames is 'all', and the images are those since the stream went on only.")
        if point.recipe != repr(recipe):
            self.notices.append(
                "The pipeline has other LoRAs, quantization or loading options than when the stream began, so its "
                "pictures are others than those of a stream that never stopped."
            )
