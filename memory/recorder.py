"""Records a stream's memory while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from .compile_caches import count_compile_caches
from .growth import judge_growth
from .owners import PICTURES, Holders, Owner, OwnerLedger
from .pipeline_facts import UNKNOWN_PIPELINE, PipelineFacts
from .readings import MemoryReading, card_bytes, read_cuda_memory, read_live_tensors
from .stage_hooks import StageHooks
from .timeline import BLOCK_END, StageRecord, Timeline

CLEAN_UP = "clean-up"
# Blocks with records that a timeline keeps before it drops every second one, so that an endless stream is bounded.
BLOCKS_KEPT = 512
# Where the requested bytes are unknown: how far the allocator's rounding may move the allocated ones in a block.
ROUNDING_BYTES = 32 * 1024**2

OnRecord = Callable[[StageRecord], None]
# Returns values that contain tensors, by name.
HeldValues = Callable[[], Mapping[str, Any]]


class NoRecording:
    """Takes the place of a recorder when nothing is recorded: no hook, no reading, no record."""

    def hold(self, kind: str, give: HeldValues) -> None:
        """Do nothing."""

    def add(self, stage: str, event: str = "") -> None:
        """Do nothing."""

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:  # noqa: ANN401
        """Do nothing."""
        yield

    def begin_block(self, index: int, pipe: Any, state: Mapping[str, Any]) -> None:  # noqa: ANN401
        """Do nothing."""

    def end_block(self, state: Mapping[str, Any], pictures: torch.Tensor) -> None:
        """Do nothing."""

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def explain_growth(self) -> str:
        """Empty: nothing was recorded."""
        return ""


class TimelineRecorder(NoRecording):
    """Reads the device's counters after every stage, and attributes memory to owners after every block.

    On CUDA that is a millisecond or two of host time per block, mostly while the host would wait for the card. Other
    devices have no counters: there a reading is the sum of what owners hold, or, if `exact`, of all live tensors.

    Args:
        device: the stream's.
        facts: of its pipeline: names of stages, advice on state that grows.
        exact: without counters, look at every live tensor for each reading: exact, and 0.1 to 0.4 seconds each.
        others: by kind of owner, a function that returns what else holds memory besides pipeline and state, by name.
        on_record: called with each record.

    Attributes:
        own_seconds: host time spent on recording.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        facts: PipelineFacts = UNKNOWN_PIPELINE,
        exact: bool = False,
        others: Mapping[str, HeldValues] | None = None,
        on_record: OnRecord | None = None,
    ) -> None:
        self.own_seconds = 0.0
        self._device = device
        self._facts = facts
        self._exact = exact
        self._others = dict(others or {})
        self._stream_others: dict[str, HeldValues] = {}
        self._on_record = on_record
        self._ledger = OwnerLedger(device.type)
        self._hooks = StageHooks(self)
        self._records: list[StageRecord] = []
        self._began = time.perf_counter()
        self._block: int | None = None
        self._blocks = 0
        self._stride = 1
        self._peak: int | None = None
        self._pipe: Any = None
        self._state: Mapping[str, Any] = {}
        self._leaf, self._pass = "", 0

    def timeline(self) -> Timeline:
        """What was recorded so far."""
        return Timeline(
            device=str(self._device),
            card_bytes=card_bytes(self._device),
            records=tuple(self._records),
            blocks=self._blocks,
            stride=self._stride,
            peak=self._peak,
            state_advice=self._facts.state_advice,
        )

    def hold(self, kind: str, give: HeldValues) -> None:
        """Count what `give` returns as owners of `kind`, until `close`."""
        self._stream_others[kind] = give

    def add(self, stage: str, event: str = "") -> None:
        """Record `stage`, which has just ended; `event` is what happened in it that may explain a step in the curve."""
        self._add(stage, event=event)

    def explain_growth(self) -> str:
        """A sentence, with a space in front, if memory grew from block to block; else an empty string."""
        verdict = judge_growth(self.timeline())
        return f" {verdict.sentence}" if verdict.grows else ""

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:  # noqa: ANN401
        """Record every leaf block of the modular pipeline `pipe` and every pass of its transformer."""
        with self._hooks.attached(pipe):
            yield

    def begin_block(self, index: int, pipe: Any, state: Mapping[str, Any]) -> None:  # noqa: ANN401
        """Block `index` of the modular pipeline `pipe` begins, with these entries in its state."""
        self._block, self._pipe, self._state = index, pipe, state

    def end_block(self, state: Mapping[str, Any], pictures: torch.Tensor) -> None:
        """The block is made: record its owners.

        Args:
            state: entries that stay until the next block.
            pictures: of the block, not yet in the sinks.
        """
        self._state = state
        self._blocks += 1
        self._add(BLOCK_END, pictures=pictures)
        self._thin_out()

    def close(self) -> None:
        """The stream is over: drop the references to its pipeline and state. The records stay."""
        self._pipe, self._state = None, {}
        self._stream_others.clear()

    def while_loading(self, component: str, done: int, total: int) -> None:
        """`done` of `total` bytes of a component are in place."""
        if done >= total:
            # Not part of the pipeline yet: owners do not count it, counters and live tensors do.
            self._add(f"load {component}", not_yet_owned=total)

    def begin_stage(self, leaf: str) -> None:
        """A leaf block is about to run."""
        self._leaf, self._pass = leaf, 0

    def end_stage(self, leaf: str, state: Any) -> None:  # noqa: ANN401
        """A leaf block has run."""
        self._state = state.values
        self._add(leaf)

    def begin_pass(self) -> None:
        """The transformer is about to run."""

    def end_pass(self) -> None:
        """The transformer has run."""
        self._add(self._facts.pass_name(self._leaf, self._pass))
        self._pass += 1

    def _add(
        self, stage: str, *, event: str = "", pictures: torch.Tensor | None = None, not_yet_owned: int = 0
    ) -> None:
        began = time.perf_counter()
        at_end = stage == BLOCK_END
        reading, owners = self._read(pictures, at_end=at_end, not_yet_owned=not_yet_owned)
        self._peak = _larger(self._peak, reading.allocated if reading.peak is None else reading.peak)
        record = StageRecord(
            stage,
            self._block,
            began - self._began,
            reading,
            owners=owners,
            caches=count_compile_caches() if at_end else None,
            event=event,
        )
        if self._block is None or self._block % self._stride == 0:
            self._records.append(record)
        if self._on_record is not None:
            self._on_record(record)
        self.own_seconds += time.perf_counter() - began

    def _read(
        self, pictures: torch.Tensor | None, *, at_end: bool, not_yet_owned: int
    ) -> tuple[MemoryReading, tuple[Owner, ...]]:
        """The reading and, at the end of a block, the owners."""
        if self._device.type == "cuda":
            reading = read_cuda_memory(self._device, with_outside=at_end)
        elif self._exact:
            reading = read_live_tensors(self._device, collect=at_end)
        elif at_end:
            owners = self._ledger.count(self._holders(pictures), None)
            return MemoryReading(allocated=sum(owner.bytes for owner in owners)), owners
        else:
            reading = MemoryReading(allocated=self._ledger.held(self._holders(pictures)) + not_yet_owned)
        if not at_end:
            return reading, ()
        tolerance = ROUNDING_BYTES if reading.requested is None and not self._exact else 0
        return reading, self._ledger.count(self._holders(pictures), reading.held, tolerance=tolerance)

    def _holders(self, pictures: torch.Tensor | None) -> Holders:
        components = {} if self._pipe is None else self._pipe.components
        others = {kind: dict(give()) for kind, give in (self._others | self._stream_others).items()}
        if pictures is not None:
            others.setdefault(PICTURES, {})["of the block"] = pictures
        return Holders(components, self._state, others)

    def _thin_out(self) -> None:
        while self._blocks > BLOCKS_KEPT * self._stride:
            self._stride *= 2
            self._records = [r for r in self._records if r.block is None or r.block % self._stride == 0]


def _larger(one: int | None, other: int) -> int:
    return other if one is None else max(one, other)
