"""Calls recorded as CUDA graphs: the host launches one thing instead of some thousand kernels.

A graph repeats the kernels of one call on the same addresses. So what a call reads is of three kinds: inputs, which are
copied to where the graph reads them; tensors that stay where they are, whose addresses are compared before each replay;
and whatever else decides which kernels run, which is the key. Once an address is no longer true, all graphs are
dropped: what moves are weights or a stream's keys, which the others read, too.

A kind of call is recorded when it comes in a turn, such as a block of a stream, after one in which it came before. So
each graph is used, what is recorded has run as ever and compiled what is to be compiled, and a turn's steps that never
come again, while the past still grows, are not recorded however many they are.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Protocol

import torch

logger = logging.getLogger(__name__)

Replay = Callable[[], Any]
# Kinds whose graphs are kept: the steps, the context's pass, and the same at another length of the past.
_MOST_KINDS = 6


class Recorder(Protocol):
    """Records calls without arguments."""

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """What repeats it, and the tensor that holds its result after each repetition; it has not run yet."""

    def forget(self) -> None:
        """Nothing is left of what was recorded so far."""


class CudaRecorder:
    """Records CUDA graphs that share one pool of memory: they never run at the same time."""

    def __init__(self) -> None:
        self._pool: Any = None

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """See `Recorder`.

        Raises:
            torch.OutOfMemoryError: no memory for the call's activations, which the pool keeps.
            RuntimeError: the call does what cannot be recorded, such as waiting for the device.
        """
        graph = torch.cuda.CUDAGraph()
        stream = torch.cuda.current_stream()
        try:
            # Other threads may allocate and copy meanwhile.
            with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
                made = function()
        finally:
            # Where the end of a capture fails, torch leaves its own stream the current one.
            torch.cuda.set_stream(stream)
        self._pool = graph.pool()
        return graph.replay, made

    def forget(self) -> None:
        """The pool went with the last of its graphs; torch refuses to record into one that has gone."""
        self._pool = None


@dataclass
class _Kind:
    addresses: tuple[int, ...]
    first_turn: int
    inputs: tuple[torch.Tensor, ...] = ()
    made: torch.Tensor | None = None
    replay: Replay | None = None


@dataclass
class CallGraphs:
    """The graphs of one model's calls.

    Attributes:
        recorder: makes them.
        off: why nothing is recorded; empty while it is.
    """

    recorder: Recorder = field(default_factory=CudaRecorder)
    off: str = ""
    _turn: int = 0
    _cannot_record: bool = False
    _kinds: dict[Hashable, _Kind] = field(default_factory=dict)

    def call(
        self,
        key: Hashable,
        in_place: Sequence[torch.Tensor],
        inputs: Sequence[torch.Tensor],
        function: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """What `function(*inputs)` returns, and does to the tensors in place; by a graph if there is one.

        Args:
            key: of all that decides which kernels run, the shapes of the inputs among it.
            in_place: tensors besides the inputs that are read or written where they are.
            inputs: tensors that are read.
            function: of tensors like the inputs.

        Returns:
            A tensor of its own.
        """
        if self.off:
            return function(*inputs)
        addresses = tuple(tensor.data_ptr() for tensor in in_place)
        kind = self._find(key, addresses)
        if kind.replay is None and not self._record(kind, inputs, function):
            return function(*inputs)
        assert kind.replay is not None and kind.made is not None
        for held, given in zip(kind.inputs, inputs, strict=True):
            held.copy_(given)
        kind.replay()
        return kind.made.clone()

    @property
    def recorded(self) -> int:
        """How many graphs there are."""
        return sum(kind.replay is not None for kind in self._kinds.values())

    def begin_turn(self) -> None:
        """What was called so far, and comes again from now on, is worth a graph."""
        self._turn += 1

    def drop(self) -> None:
        """Give back all graphs and their memory; what comes again is recorded anew."""
        self._kinds.clear()
        self.recorder.forget()

    def stop(self, why: str) -> None:
        """Give them back, and record nothing until `resume`."""
        self.drop()
        self.off = self.off or why

    def resume(self) -> None:
        """Record again, unless it has failed for another reason than memory."""
        if not self._cannot_record:
            self.off = ""

    def _find(self, key: Hashable, addresses: tuple[int, ...]) -> _Kind:
        """The kind, now the most recently used, without a graph where its tensors have moved."""
        kind = self._kinds.pop(key, None)
        if kind is None or kind.addresses != addresses:
            if kind is not None and kind.replay is not None:
                self.drop()
            kind = _Kind(addresses, self._turn)
        self._kinds[key] = kind
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.pop(next(iter(self._kinds)))
        return kind

    def _record(self, kind: _Kind, inputs: Sequence[torch.Tensor], function: Callable[..., torch.Tensor]) -> bool:
        """Whether there is a graph now; what cannot be recorded is said once, and nothing is recorded after it."""
        if kind.first_turn == self._turn:
            return False
        if not self.recorded:
            self.recorder.forget()
        held = tuple(tensor.clone() for tensor in inputs)
        try:
            kind.replay, kind.made = self.recorder(partial(function, *held))
        except RuntimeError as error:
            # Out of memory, too: without graphs the call may have room, and if it has not, it says so itself.
            self.stop(f"{type(error).__name__}: {error}")
            self._cannot_record = not isinstance(error, torch.OutOfMemoryError)
            logger.warning("CUDA graphs are not used any more in this stream: recording a call failed. %s", self.off)
            return False
        kind.inputs = held
        return True
