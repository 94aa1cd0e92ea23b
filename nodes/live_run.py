"""What pages see of one run of the sampler, and what they ask of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .. import host
from ..stream.device_choice import check_attention_backend
from ..stream.direction import Direction
from ..stream.foreign_limits import refuse_bias
from ..stream.live_control import Allowed, LiveControl, Refusal
from ..stream.live_news import LiveNews
from ..stream.prompt_track import MOST_LINES
from ..stream.steering import Steering

if TYPE_CHECKING:
    import torch

    from ..stream.placed_track import PlacedTrack
    from ..stream.run_point import RunPoint
    from ..stream.settings import StreamSettings
    from ..stream.stream_pipeline import StreamPipeline
    from .connected_pictures import LiveFrames

_NO_PROMPTS = Refusal(
    "A conditioning is connected, and it is the prompt: disconnect it to change the prompt of a stream.",
    "refused_conditioning",
)
_NO_VIDEO = Refusal(
    "No video is connected, so strength has no effect: connect one to 'video' for the next stream.", "refused_no_video"
)
_NOTHING_CAME = (
    "live: the stream was stopped before a picture came, so there is nothing to keep: press start on Stream Live Input."
)
_OVER = Refusal("The stream has made its last block: start another one.", "refused_ended")
_LAST = Refusal(
    "The stream is making its last block, so no block would follow the edit: start another one.", "refused_last_block"
)
_TOO_MANY = Refusal(
    f"The stream's track has {MOST_LINES} lines, and a track can have no more: start another stream.",
    "refused_track_full",
)
# One for the prompt, one for the values.
_LINES_OF_AN_EDIT = 2
# Any bias below 1 needs a mask.
_A_BIAS = 0.5


class LiveRun:
    """One run of the sampler, live: takes the stream's pictures as a sink does.

    Args:
        node: the node's execution id; None outside of a prompt.
        workflow: the page's id of the workflow; None outside of a page.
        look: called while the stream is paused; raises when the user cancels.
        frames: the pictures that pages push; None where the stream takes none.

    Attributes:
        news: what pages are told.
        ran_out: whether the stream ended early for want of memory.
    """

    def __init__(
        self, node: str | None, workflow: str | None, look: Callable[[], None], frames: LiveFrames | None = None
    ) -> None:
        self.news = LiveNews()
        self.ran_out = False
        self._control = LiveControl()
        self._node, self._workflow, self._look = node, workflow, look
        self._frames = frames
        self._steering = Steering(self._control, self._wait, self._tell, self._show_part, lambda: self.news.is_watched)
        self._attention_bias = 1.0
        self._fps = 1.0
        self._allowed = Allowed()
        self._planned: int | None = None
        self._told: Direction | None = None
        self._blocks = self._pictures = 0
        self._began = time.perf_counter()

    def open(self) -> AbstractContextManager[str]:
        """Pages may watch and steer the stream while this is open."""
        inbox, frames_from = (None, None) if self._frames is None else (self._frames.inbox, self._frames.node)
        return host.running(
            host.running_prompt(), self._node, self._workflow, self._control, self.news, inbox, frames_from
        )

    def wait_for_frames(self) -> None:
        """Say that the first picture is waited for; raise ValueError where somebody stops the stream."""
        if self.news.state == "running":
            self.news.update(state="loading")
        if self._control.is_stopped:
            raise ValueError(_NOTHING_CAME)

    def say(self, message: str, values: Mapping[str, Any]) -> None:
        """Tell pages the line that is said on the node."""
        self.news.update(says={"id": message, "values": dict(values)})

    def steer(
        self,
        pipeline: StreamPipeline,
        settings: StreamSettings,
        direction: Direction,
        fps: float,
        resumed: RunPoint | None = None,
    ) -> Steering:
        """Tell what is planned, and which edits have an effect.

        Args:
            pipeline: materialised.
            settings: of the stream.
            direction: as planned.
            fps: pictures a second.
            resumed: where the stream goes on; None for one that begins.
        """
        if resumed is not None:
            self._blocks, self._pictures = resumed.blocks, resumed.pictures
        self._attention_bias, self._fps = settings.attention_bias, fps
        self._allowed = Allowed(
            prompt="" if direction.embeds is None else _NO_PROMPTS,
            strength=_NO_VIDEO if direction.video is None else "",
            attention_bias=_why_no_bias(pipeline),
        )
        # Asked for while the stream was loaded: what has no effect is dropped, and pages are told.
        self._control.allow(self._allowed)
        self._planned = settings.planned_blocks
        self.news.update(blocks=self._planned, fps=fps)
        return self._steering

    def write(self, frames: torch.Tensor) -> None:
        """Show a block's pictures, uint8 [F, height, width, 3] on the CPU."""
        now = time.perf_counter()
        self._pictures += len(frames)
        self.news.show_block(
            frames,
            block=self._blocks,
            blocks_made=self._blocks + 1,
            pictures_made=self._pictures,
            seconds=self._pictures / self._fps,
            rate=len(frames) / (now - self._began),
        )
        self._blocks += 1

    def close(self) -> None:
        """Take no more edits: there is no block to follow them."""
        self._control.allow(Allowed(_OVER, _OVER, _OVER))

    def say_how_it_ended(self, error: BaseException | None) -> None:
        """Tell whether the stream came to its end, was stopped by hand or cancelled, or failed."""
        if error is None:
            state = "stopped" if self._steering.stopped else "finished"
        else:
            state = "cancelled" if host.is_cancel(error) else "failed"
        ended: dict[str, Any] = {"state": state}
        if self._told is not None and self._blocks:
            # Of the blocks that were made, as the page offers it for so many.
            ended["track"] = self._told.until(self._blocks).as_track().written()
            ended["edited"] = self._steering.edited or self._steering.stopped
        self.news.update(**ended)
        # What pages give is no input of the node's either, and memory may be free another time.
        changed = self._steering.stopped or self._steering.edited or self._frames is not None or self.ran_out
        if self._node is not None and changed:
            host.note_changed_by_hand(self._node)

    def _show_part(self, frames: torch.Tensor, first: int, of: int) -> None:
        """Show pictures of the block that is being decoded."""
        self.news.show_part(frames, block=self._blocks, first=first, of=of)

    def _wait(self) -> None:
        """Say that the stream waits, and look whether it is cancelled."""
        if self.news.state != "paused":
            self.news.update(state="paused")
        self._look()

    def _tell(self, index: int, direction: Direction) -> None:
        """Tell what the next block is made of."""
        self._began = time.perf_counter()
        track = direction.as_track()
        self._control.allow(self._allowed_behind(index, track))
        ahead = track.next_line(index)
        fields: dict[str, Any] = {
            "state": "running",
            "prompt": direction.name_of(index),
            "strength": direction.strength_of(index),
            "attention_bias": direction.bias_of(index, self._attention_bias),
            "next": None if ahead is None else {"block": ahead[0], "prompt": ahead[1]},
        }
        if direction is not self._told:
            self._told = direction
            fields |= {
                "track": track.written(),
                "interpolation": track.interpolation,
                "edited": self._steering.edited,
            }
        self.news.update(**fields)

    def _allowed_behind(self, index: int, track: PlacedTrack) -> Allowed:
        """Which edits take effect while a block is made: those that wait until it is done."""
        if self._planned is not None and index + 1 >= self._planned:
            return Allowed(_LAST, _LAST, _LAST)
        if len(track.lines) + len(track.values) + _LINES_OF_AN_EDIT > MOST_LINES:
            return Allowed(_TOO_MANY, _TOO_MANY, _TOO_MANY)
        return self._allowed


def _why_no_bias(pipeline: StreamPipeline) -> str:
    try:
        refuse_bias(pipeline.recipe, _A_BIAS, pipeline.pipe.blocks.input_names)
        check_attention_backend(pipeline.recipe.attention_backend, pipeline.device, _A_BIAS)
    except ValueError as error:
        return Refusal(str(error), "refused_bias")
    return ""
