"""What pages see of one run of the sampler, and what they ask of it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any

from .. import host
from ..stream.device_choice import check_attention_backend
from ..stream.direction import Direction
from ..stream.foreign_limits import refuse_bias
from ..stream.live_control import Allowed, LiveControl
from ..stream.live_news import LiveNews
from ..stream.steering import Steering

if TYPE_CHECKING:
    from ..stream.session import StreamBlock
    from ..stream.settings import StreamSettings
    from ..stream.stream_pipeline import StreamPipeline

_NO_PROMPTS = "A conditioning is connected, and it is the prompt: disconnect it to change the prompt of a stream."
_NO_VIDEO = "No video is connected, so strength has no effect: connect one to 'video' for the next stream."
# Any bias below 1 needs a mask.
_A_BIAS = 0.5


class LiveRun:
    """One run of the sampler, live.

    Args:
        node: the node's execution id; None outside of a prompt.
        workflow: the page's id of the workflow; None outside of a page.
        look: called while the stream is paused; raises when the user cancels.

    Attributes:
        news: what pages are told.
    """

    def __init__(self, node: str | None, workflow: str | None, look: Callable[[], None]) -> None:
        self.news = LiveNews()
        self._control = LiveControl()
        self._node, self._workflow, self._look = node, workflow, look
        self._settings: StreamSettings | None = None
        self._told: Direction | None = None
        self._blocks = self._pictures = 0
        self._fps = 0.0

    def open(self) -> AbstractContextManager[str]:
        """Pages may watch and steer the stream while this is open."""
        return host.running(host.running_prompt(), self._node, self._workflow, self._control, self.news)

    def steer(self, pipeline: StreamPipeline, settings: StreamSettings, direction: Direction, fps: float) -> Steering:
        """Take edits from now on: it is known which of them have an effect.

        Args:
            pipeline: materialised.
            settings: of the stream.
            direction: as planned.
            fps: pictures a second.
        """
        self._settings, self._fps = settings, fps
        self._control.allowed = Allowed(
            prompt="" if direction.embeds is None else _NO_PROMPTS,
            strength=_NO_VIDEO if direction.video is None else "",
            attention_bias=_why_no_bias(pipeline),
        )
        self.news.update(blocks=settings.planned_blocks, fps=fps)
        steering = Steering(self._control, self._wait, self._tell)
        self._edited = lambda: steering.edited
        return steering

    def after_block(self, block: StreamBlock, pictures: int) -> None:
        """Show a finished block, of which `pictures` are in the video."""
        self._blocks += 1
        self._pictures += pictures
        self.news.show_block(
            block.frames,
            block=block.index,
            state="running",
            blocks_made=self._blocks,
            pictures_made=self._pictures,
            seconds=self._pictures / self._fps,
            rate=len(block.frames) / block.seconds,
        )

    def _wait(self) -> None:
        """Say that the stream waits, and look whether it is cancelled."""
        if self.news.since().header["state"] != "paused":
            self.news.update(state="paused")
        self._look()

    def _tell(self, index: int, direction: Direction) -> None:
        """Tell what the next block is made of."""
        assert self._settings is not None
        fields: dict[str, Any] = {
            "state": "running",
            "prompt": None if direction.embeds is not None else direction.name_of(index),
            "strength": direction.strength_of(index),
            "attention_bias": direction.bias_of(index, self._settings.attention_bias),
        }
        track = direction.as_track()
        ahead = track.next_line(index)
        fields["next"] = None if ahead is None else {"block": ahead[0], "prompt": ahead[1]}
        if direction is not self._told:
            self._told = direction
            fields |= {"track": track.written(), "interpolation": track.interpolation, "edited": self._edited()}
        self.news.update(**fields)


def _why_no_bias(pipeline: StreamPipeline) -> str:
    try:
        refuse_bias(pipeline.recipe, _A_BIAS, pipeline.pipe.blocks.input_names)
        check_attention_backend(pipeline.recipe.attention_backend, pipeline.device, _A_BIAS)
    except ValueError as error:
        return str(error)
    return ""
