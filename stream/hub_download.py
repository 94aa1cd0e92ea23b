"""Download one file of a hub repository: counted, patient, and given up at once where nobody waits for it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download
from huggingface_hub.utils import tqdm as hub_tqdm

from .abandoned_work import Abandoned, never_cancelled
from .hub_patience import HubPatience

# From one byte of an answer to the next; the library's own default for files.
BYTE_SECONDS = 10.0


def download_file(repository: str, path: str, revision: str | None, on_count: Callable[[int], None]) -> Path:
    """One file of a repository, in the hub's cache.

    Args:
        repository: owner/name.
        path: of the file in it.
        revision: None for the default branch.
        on_count: called some times a second with the bytes of the file so far; what it raises ends the download.
    """
    progress = FileProgress()
    patience = HubPatience(lambda: on_count(progress.count))
    progress.on_begin = patience.hear
    call = partial(
        hf_hub_download,
        repository,
        path,
        revision=revision,
        etag_timeout=BYTE_SECONDS,
        tqdm_class=progress.bar_class(),
    )
    try:
        return Path(patience.run(call))
    except BaseException:
        progress.stop()
        raise


@dataclass
class FileProgress:
    """How far the download of one file is, whichever of the hub's transfers makes it.

    Attributes:
        count: bytes that have arrived: the most that a bar has said. The hub's Xet transfer has two bars for a file.
        stopped: whether nobody waits for the file any more.
        on_begin: called when the first bytes are to come.
    """

    count: int = 0
    stopped: bool = False
    on_begin: Callable[[], None] = never_cancelled

    def advance(self, count: int) -> None:
        """A bar has reached `count` bytes; raises `Abandoned` after `stop`."""
        if self.stopped:
            raise Abandoned
        self.count = max(self.count, count)

    def stop(self) -> None:
        """End the transfer."""
        if not self.stopped:
            self.stopped = True
            # Xet calls from a thread of its own, where an exception would be printed and forgotten.
            _abort_xet_transfers()

    def bar_class(self) -> type[Any]:
        """A silent progress bar, as `hf_hub_download` takes one."""
        progress = self

        class Bar(hub_tqdm):
            def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
                self._count = int(options.get("initial") or 0)
                super().__init__(*args, **{**options, "disable": True})
                progress.on_begin()

            def update(self, n: float | None = 1) -> bool | None:
                self._count += int(n or 0)
                progress.advance(self._count)
                return None

        return Bar


def _abort_xet_transfers() -> None:
    """Stop the hub's Xet transfers, where this version of its library can; else the file is finished first."""
    with suppress(ImportError):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()
