"""Lines of text on a node that reads or writes a model: how much of it is done, and how it ended."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .. import host
from ..memory.byte_text import format_bytes

# Limits the lines sent to the page.
_PERCENT_STEP = 5


class ByteProgress:
    """Reports progress each time it has advanced by 5 %.

    Args:
        progress: of the node.
    """

    def __init__(self, progress: host.StreamProgress) -> None:
        self._progress = progress
        self._said = ("", 0)

    def show(self, doing: str, done: int, total: int) -> None:
        """Report `done` of `total` bytes of the work named `doing`, such as "loading vae"."""
        percent = 100 * done // max(total, 1)
        now = (doing, percent // _PERCENT_STEP)
        if now != self._said:
            self._said = now
            # Of what another machine has not answered about, no size is known.
            self._progress.say(f"{doing}: {percent} % of {total / 1e9:.2f} GB" if total else f"{doing}: waiting")


@contextmanager
def saying_stopped(progress: host.StreamProgress, kept: str) -> Iterator[None]:
    """Say what is kept when a cancel or an error ends the work inside: its last line would stay on the node.

    Args:
        progress: of the node.
        kept: such as "nothing was written".
    """
    try:
        yield
    except BaseException:
        progress.say(f"Stopped; {kept}.")
        raise


def say_saved(progress: host.StreamProgress, path: Path) -> str:
    """Say where a new file is and how large, as the node's last line; returns the line."""
    text = f"Saved {path}, {format_bytes(path.stat().st_size)}."
    progress.say(text)
    return text
