"""A stream that is edited at random times while a page watches it; nothing of it is made before it runs."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from threading import Condition, Thread

import streamblocks_path  # noqa: F401
import torch
from live_random_pipeline import LiveRandomPipeline
from random_pipeline import PROMPT

from streamblocks.stream.direction import Direction
from streamblocks.stream.live_control import Edit, LiveControl
from streamblocks.stream.live_news import LiveNews
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import StreamBlock
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.steering import Steering

# The window has slid and everything is compiled; blocks that are alike tell a block's time.
FIRST_STEADY_BLOCK = 3
_SECONDS_TO_WAIT = 120.0


@dataclass(frozen=True)
class Mode:
    """What the stream does for those who watch.

    Attributes:
        name: of it.
        parts: pictures are shown as they are decoded.
        most_done: see `LiveBlock`; 0 begins no block again.
        is_watched: whether anybody watches.
    """

    name: str
    parts: bool
    most_done: float
    is_watched: bool = True


@dataclass(frozen=True)
class MadeEdit:
    """One edit, in seconds.

    Attributes:
        phase: when in its block it came, in steady blocks' times.
        picture: until its first picture was there for a page.
        jpeg: until that picture was encoded for the page.
        waited: 0 if the block in which it came follows it, else how many blocks later.
    """

    phase: float
    picture: float
    jpeg: float
    waited: int


@dataclass
class EditedStream:
    """One stream of one mode: watcher, sink and page of it, and who edits it.

    Attributes:
        made: the edits, in their order.
        block_seconds: of steady blocks that were not edited.
    """

    mode: Mode
    pipeline: LiveRandomPipeline
    settings: StreamSettings
    edits: int
    seed: int = 0
    made: list[MadeEdit] = field(default_factory=list)
    block_seconds: list[float] = field(default_factory=list)
    begun_again: int = 0

    def __post_init__(self) -> None:
        self._news, self._control = LiveNews(), LiveControl()
        self._changed = Condition()
        self._began: dict[int, float] = {}
        self._prompts: dict[int, str] = {}
        self._seen: dict[int, tuple[float, float]] = {}
        self._has_news = self._is_over = False
        self._block = 0
        self._block_ended = 0.0

    def run(self) -> None:
        """Make the stream until all edits have been seen, or `settings.blocks` blocks where there are none."""
        steering = Steering(
            self._control,
            tell=self._tell,
            show=self._show if self.mode.parts else None,
            is_watched=lambda: self.mode.is_watched,
            most_done=self.mode.most_done,
        )
        threads = [Thread(target=self._watch, daemon=True)] if self.mode.is_watched else []
        threads += [Thread(target=self._edit, daemon=True)] if self.edits else []
        self._news.add_listener(self._wake)
        for thread in threads:
            thread.start()
        try:
            run_stream(self.pipeline, self.settings, Direction.of(PROMPT), [self], self, steering=steering)
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
            for thread in threads:
                thread.join()
        self.begun_again = steering.begun_again

    @property
    def block_time(self) -> float:
        """Median of the steady blocks that were not edited, in seconds."""
        return median(self.block_seconds)

    # What a stream's watcher and sink are told.

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Nothing is loaded."""

    def before_pass(self, index: int) -> None:
        """Nobody counts passes."""

    def after_block(self, block: StreamBlock) -> None:
        """A block is made: it counts for a block's time, unless it or the one before was edited."""
        now = time.perf_counter()
        known = self._prompts.get(block.index - 1)
        if block.index > FIRST_STEADY_BLOCK and self._prompts[block.index] == known:
            self.block_seconds.append(now - self._block_ended)
        self._block_ended = now

    def write(self, frames: torch.Tensor) -> None:
        """Show a whole block, as the node does."""
        self._news.show_block(frames, block=self._block)

    def close(self) -> None:
        """Nothing is open."""

    def _show(self, frames: torch.Tensor, first: int, of: int) -> None:
        self._news.show_part(frames, block=self._block, first=first, of=of)

    def _tell(self, index: int, direction: Direction) -> None:
        with self._changed:
            self._block = index
            self._began.setdefault(index, time.perf_counter())
            self._prompts[index] = direction.name_of(index) or ""
            self._changed.notify_all()

    def _wake(self) -> None:
        with self._changed:
            self._has_news = True
            self._changed.notify_all()

    # A page, and somebody who edits, each in a thread.

    def _watch(self) -> None:
        block, pictures = -1, 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._has_news or self._is_over)
                if self._is_over:
                    return
                self._has_news = False
            page = self._news.since(block, pictures=pictures if self.mode.parts else None)
            if page.pictures is None:
                continue
            there = time.perf_counter()
            for part in (page.pictures, *page.more):
                part.encoded()
                with self._changed:
                    self._seen.setdefault(part.block, (there, time.perf_counter()))
                    self._changed.notify_all()
                block, pictures = part.block, part.end

    def _edit(self) -> None:
        chance = random.Random(self.seed)
        for number in range(self.edits):
            # A whole block that nobody edits lies between two edits.
            start = max(FIRST_STEADY_BLOCK + 2, self._block + 2)
            if not self._wait(partial(self._began.__contains__, start)):
                return
            phase = chance.random()
            time.sleep(max(0.0, self._began[start] + phase * self.block_time - time.perf_counter()))
            prompt, came_in, posted = f"edit {number}", self._block, time.perf_counter()
            self._control.edit(Edit(prompt=prompt))
            if not self._wait(partial(self._is_seen, prompt)):
                return
            follower = self._follower(prompt)
            there, encoded = self._seen[follower]
            phase = (posted - self._began[came_in]) / self.block_time
            self.made.append(MadeEdit(phase, there - posted, encoded - posted, follower - came_in))
        self._control.stop()

    def _is_seen(self, prompt: str) -> bool:
        return self._follower(prompt) in self._seen

    def _follower(self, prompt: str) -> int:
        """The block that follows an edit; -1 where none has begun."""
        return next((block for block, shown in list(self._prompts.items()) if shown == prompt), -1)

    def _wait(self, holds: Callable[[], bool]) -> bool:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or holds(), _SECONDS_TO_WAIT)
            return not self._is_over
