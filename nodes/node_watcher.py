"""Shows a stream's progress on the sampler's node."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from .. import host
from ..stream.settings import StreamSettings
from .byte_progress import ByteProgress


class NodeWatcher:
    """Shows a stream's progress on its node, and stops the stream when the user cancels.

    Args:
        progress: of the node.
        is_watched: whether a page plays the stream.
    """

    def __init__(self, progress: host.StreamProgress, is_watched: Callable[[], bool]) -> None:
        self._is_watched = is_watched
        self._settings = StreamSettings()
        self._progress = progress
        self._blocks_done = 0
        self._begun = self._loads = self._waits = self.kept_is_said = False
        self._loading = ByteProgress(progress)

    def begin(self, settings: StreamSettings, blocks_made: int = 0) -> None:
        """Say what the stream is, once it is known; `blocks_made` of it are made already."""
        self._settings = settings
        self._blocks_done = blocks_made
        self._begun = True
        self._progress.expect(settings.passes_before(1) if settings.endless else settings.passes)

    def while_loading(self, component: str, done: int, total: int) -> None:
        """See `StreamWatcher`."""
        host.throw_if_cancelled()
        self._loading.show_loading(component, done, total)
        self._loads = done < total
        if not self._loads:
            self._say_block()

    def while_waiting(self) -> None:
        """Say that the stream waits for a page's first picture."""
        host.throw_if_cancelled()
        if not self._waits:
            self._waits = True
            self._progress.say("waiting_for_frames")
            # The next pass says what is made, in place of this.
            self._loads = True

    def compiling_begins(self) -> None:
        """Say that the layers are compiled, for which the block stands still; see `telling_of_compilation`."""
        self._progress.say("compiling", block=self._blocks_done + 1)

    def compiling_ends(self) -> None:
        """Say which block is made, as before."""
        self._say_block()

    def before_pass(self, index: int) -> None:
        """See `StreamWatcher`."""
        # Context and clean passes do not count: the user chose a number of denoising steps.
        before, after = (self._settings.passes_before(self._blocks_done + more) for more in (0, 1))
        if self._settings.endless:
            # Of the block: of the whole stream there is no share.
            before, after = 0, after - before
        self._progress.update(min(before + index, after))
        if self._loads:
            # A load that was not told of to its end, such as a download's.
            self._loads = False
            self._say_block()

    def after_block(self, block: Any) -> None:  # noqa: ANN401
        """See `StreamWatcher`."""
        self._blocks_done = block.index + 1
        rate = f"{len(block.frames) / block.seconds:.1f}"
        watched = self._is_watched()
        if self._settings.endless:
            self._progress.show_picture(0, block.frames[-1], someone_watches=watched)
            self._progress.expect(self._settings.steps)
            self._progress.say("endless_block_made", block=self._blocks_done, rate=rate)
        else:
            done = self._settings.passes_before(self._blocks_done)
            self._progress.show_picture(done, block.frames[-1], someone_watches=watched)
            self._progress.say("block_made", block=self._blocks_done, blocks=self._settings.blocks, rate=rate)

    def say_stopped(self) -> None:
        """Say that a stream stopped, unless what is kept of it has been said."""
        if not self.kept_is_said:
            self._progress.say("stopped_empty")

    def _say_block(self) -> None:
        """Say which block is made, in place of what is loaded no more."""
        if not self._begun:
            return
        if self._settings.endless:
            self._progress.say("endless_block_begins", block=self._blocks_done + 1)
        elif self._blocks_done < self._settings.blocks:
            self._progress.say("block_begins", block=self._blocks_done + 1, blocks=self._settings.blocks)
