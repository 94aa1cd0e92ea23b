"""Lines of text on a node that reads or writes a model: how much of it is done, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import host
from ..memory.byte_text import format_bytes
from ..stream.recipe import DOWNLOAD_OF

# Limits the lines sent to the page.
_PERCENT_STEP = 5


class ByteProgress:
    """Reports progress each time it has advanced by 5 %.

    Args:
        progress: of the node.
    """

    def __init__(self, progress: host.StreamProgress) -> None:
        self._progress = progress
        self._said: tuple[str, str, int] = ("", "", 0)

    def show_loading(self, component: str, done: int, total: int) -> None:
        """Report `done` of `total` bytes of a component that is loaded or downloaded; see `LoadCallback`."""
        if component.startswith(DOWNLOAD_OF):
            component = component.removeprefix(DOWNLOAD_OF)
            if not self._has_moved("downloading", component, done, total):
                return
            if total:
                self._progress.say("downloading", name=component, percent=_percent(done, total), gb=_gb(total))
            else:
                # Of what another machine has not answered about, no size is known.
                self._progress.say("waiting_for_hub", name=component)
        elif self._has_moved("loading", component, done, total):
            self._progress.say("loading", component=component, percent=_percent(done, total), gb=_gb(total))

    def show_writing(self, file: str, done: int, total: int) -> None:
        """Report `done` of `total` bytes of a file that is written."""
        if self._has_moved("writing", file, done, total):
            self._progress.say("writing", file=file, percent=_percent(done, total), gb=_gb(total))

    def _has_moved(self, doing: str, what: str, done: int, total: int) -> bool:
        before, self._said = self._said, (doing, what, _percent(done, total) // _PERCENT_STEP)
        return self._said != before


def _percent(done: int, total: int) -> int:
    return 100 * done // max(total, 1)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f}"


@contextmanager
def saying_stopped(progress: host.StreamProgress) -> Iterator[None]:
    """Say that nothing was written when a cancel or an error ends the work inside: its last line would stay."""
    try:
        yield
    except BaseException:
        progress.say("nothing_written")
        raise


def say_saved(progress: host.StreamProgress, path: Path) -> str:
    """Say where a new file is and how large, as the node's last line; returns the line in English."""
    return progress.say("saved", path=str(path), size=format_bytes(path.stat().st_size))
