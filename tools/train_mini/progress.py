"""Progress of a stage on the terminal: from time to time a line with the loss and the time left."""

from __future__ import annotations

import time

_BAR = 20


class Progress:
    """Prints at most one line per `interval_s`, and the last.

    Args:
        stage: shown in front.
        done: steps made before, by a run that is resumed.
        total: steps of the stage.
        interval_s: of silence between lines.
    """

    def __init__(self, stage: str, done: int, total: int, interval_s: float = 10.0) -> None:
        self._stage, self._first, self._total, self._interval = stage, done, total, interval_s
        self._began = self._last = time.perf_counter()

    def show(self, done: int, text: str) -> None:
        """`done` steps are made; `text` says how it goes."""
        now = time.perf_counter()
        if now - self._last < self._interval and done < self._total:
            return
        self._last = now
        per_step = (now - self._began) / max(1, done - self._first)
        filled = _BAR * done // self._total
        bar = "#" * filled + "." * (_BAR - filled)
        left = per_step * (self._total - done)
        print(
            f"{self._stage} [{bar}] {done}/{self._total}  {text}  {per_step:.2f} s a step, {left / 60:.1f} min left",
            flush=True,
        )
