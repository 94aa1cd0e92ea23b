"""Time by stage of a block, without making the host wait for the device.

The timer wraps the leaf blocks of a modular pipeline and the passes of its transformer. On CUDA it records an
event before and after each; they are read after the block, when its pictures have left the device anyway.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from diffusers.modular_pipelines import ModularPipeline

from streamblocks.memory.stage_hooks import StageHooks

Mark = torch.cuda.Event | float


@dataclass(frozen=True)
class Span:
    """One measured stretch: `name` is a leaf block, or `leaf/pass N` for the Nth transformer pass inside it."""

    name: str
    begin: Mark
    end: Mark

    def milliseconds(self) -> float:
        """How long it took; on CUDA the device must have passed the end."""
        if isinstance(self.begin, torch.cuda.Event) and isinstance(self.end, torch.cuda.Event):
            return self.begin.elapsed_time(self.end)
        assert isinstance(self.begin, float) and isinstance(self.end, float)
        return 1000.0 * (self.end - self.begin)


@dataclass
class StageTimer:
    """Spans of the block being made; use `attached` around the blocks and `take` after each.

    Attributes:
        device: CUDA is timed by events, every other device by the host's clock.
        ranges: also mark each stage for the profiler.
    """

    device: torch.device
    ranges: bool = False
    spans: list[Span] = field(default_factory=list)
    _stage: str = ""
    _passes: int = 0
    _open_stage: Mark | None = None
    _open_pass: Mark | None = None
    _range: Any = None

    @contextmanager
    def attached(self, pipe: ModularPipeline) -> Iterator[None]:
        """Time every leaf block of `pipe` and every pass of its transformer inside the `with` block."""
        with StageHooks(self).attached(pipe):
            yield

    def begin_stage(self, leaf: str) -> None:
        """A leaf block is about to run."""
        self._stage, self._passes = leaf, 0
        self._open_stage = self._mark()
        if self.ranges:
            self._range = torch.profiler.record_function(f"stage: {leaf}")
            self._range.__enter__()

    def end_stage(self, leaf: str, state: Any) -> None:  # noqa: ANN401
        """It has run."""
        if self._range is not None:
            self._range.__exit__(None, None, None)
            self._range = None
        if self._open_stage is not None:
            self.spans.append(Span(leaf, self._open_stage, self._mark()))
        self._stage = ""

    def begin_pass(self) -> None:
        """The transformer is about to run."""
        self._open_pass = self._mark()

    def end_pass(self) -> None:
        """It has run."""
        if self._open_pass is None:
            return
        self.spans.append(Span(f"{self._stage}/pass {self._passes}", self._open_pass, self._mark()))
        self._open_pass = None
        self._passes += 1

    def take(self) -> dict[str, float]:
        """Milliseconds by span since the last call; waits until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans, self.spans = self.spans, []
        times: dict[str, float] = {}
        for span in spans:
            times[span.name] = times.get(span.name, 0.0) + span.milliseconds()
        return times

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
