"""Time by stage of a block, without making the host wait for the device.

The timer wraps the leaf blocks of a modular pipeline and the passes of its transformer. On CUDA it records an
event before and behind each; they are read after the block, when its pictures have left the device anyway.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks
from torch import nn

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
    _open_pass: Mark | None = None

    @contextmanager
    def attached(self, pipe: ModularPipeline) -> Iterator[None]:
        """Time every leaf block of `pipe` and every pass of its transformer inside the `with` block."""
        leaves = list(leaf_blocks(pipe._blocks))
        kinds = [(leaf, type(leaf)) for _, leaf in leaves]
        hooks = self._watch_passes(pipe.transformer)
        for name, leaf in leaves:
            # A class of its own, because a call looks `__call__` up on the class; the block itself, which
            # diffusers deep-copies, holds nothing of the timer.
            leaf.__class__ = _timed_kind(type(leaf), name, self)
        try:
            yield
        finally:
            for leaf, kind in kinds:
                leaf.__class__ = kind
            for hook in hooks:
                hook.remove()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time what runs inside the `with` block as the stage `name`."""
        self._stage, self._passes = name, 0
        begin = self._mark()
        with torch.profiler.record_function(f"stage: {name}") if self.ranges else nullcontext():
            yield
        self.spans.append(Span(name, begin, self._mark()))
        self._stage = ""

    def take(self) -> dict[str, float]:
        """Milliseconds by span since the last call; waits until the device is done."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        spans, self.spans = self.spans, []
        times: dict[str, float] = {}
        for span in spans:
            times[span.name] = times.get(span.name, 0.0) + span.milliseconds()
        return times

    def _watch_passes(self, transformer: nn.Module) -> list[Any]:
        def before(module: nn.Module, arguments: Any) -> None:  # noqa: ANN401
            self._open_pass = self._mark()

        def after(module: nn.Module, arguments: Any, output: Any) -> None:  # noqa: ANN401
            if self._open_pass is None:
                return
            self.spans.append(Span(f"{self._stage}/pass {self._passes}", self._open_pass, self._mark()))
            self._open_pass = None
            self._passes += 1

        return [transformer.register_forward_pre_hook(before), transformer.register_forward_hook(after)]

    def _mark(self) -> Mark:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def leaf_blocks(blocks: ModularPipelineBlocks) -> Iterator[tuple[str, ModularPipelineBlocks]]:
    """Every block without sub-blocks, with its name, in the order they run."""
    for name, block in blocks.sub_blocks.items():
        if block.sub_blocks:
            yield from leaf_blocks(block)
        else:
            yield name, block


def _timed_kind(kind: type[ModularPipelineBlocks], name: str, timer: StageTimer) -> type[ModularPipelineBlocks]:
    def timed_call(block: ModularPipelineBlocks, *arguments: Any) -> Any:  # noqa: ANN401
        with timer.stage(name):
            return kind.__call__(block, *arguments)

    members: dict[str, Callable[..., Any] | str] = {"__call__": timed_call, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)
