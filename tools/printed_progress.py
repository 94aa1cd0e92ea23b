"""What nodes say while a workflow runs, as lines on a terminal."""

from __future__ import annotations

import re
import time

# Seconds without output after which a step is printed.
SILENCE_S = 10.0
# How nodes report bytes that are read or written, such as "loading vae: 35 % of 0.51 GB".
_BYTES = re.compile(r": (\d+) % of ")


class PrintedProgress:
    """Prints what nodes say; from work that is under way, only what breaks a long silence."""

    def __init__(self) -> None:
        self._started = self._last = time.perf_counter()
        self._current: tuple[str, str] | None = None

    def say(self, node: str, text: str) -> None:
        """Print a node's line of text; of loading, saving and downloading, the end and now and then a step.

        What the node goes on with behind loading something is not said again.
        """
        moved = _BYTES.search(text)
        if moved:
            is_new = int(moved[1]) >= 100
        else:
            is_new, self._current = (node, text) != self._current, (node, text)
        if is_new or self._is_silent():
            self._print(f"{node}: {text}")

    def step(self, node: str, value: int, total: int) -> None:
        """Print a node's progress after a silence."""
        if self._is_silent():
            self._print(f"{node}: step {value} of {total}")

    def _is_silent(self) -> bool:
        return time.perf_counter() - self._last > SILENCE_S

    def _print(self, line: str) -> None:
        self._last = time.perf_counter()
        print(f"[{self._last - self._started:7.1f} s] {line}", flush=True)
