"""Calls recorded as CUDA graphs: the host launches one thing instead of some thousand kernels.

A graph repeats the kernels of one call on the same addresses. So what a call reads is of three kinds: inputs, which are
copied to where the graph reads them; tensors that stay where they are, whose addresses are compared before each replay;
and whatever else decides which kernels run, which is the key. A graph whose addresses are no longer true is dropped.
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
# Calls of one kind that run as ever before one is recorded: a block's steps at a length of the past that never comes
# again are not worth a graph. The first of them also compiles what is compiled.
_CALLS_BEFORE = 4
# Kinds whose graphs are kept: the steps, the context's pass, and the same at another length of the past.
_MOST_KINDS = 6


class Recorder(Protocol):
    """Records a call without arguments."""

    def __call__(self, function: Callable[[], torch.Tensor]) -> tuple[Replay, torch.Tensor]:
        """What repeats it, and the tensor that holds its result after each repetition; it has not run yet."""


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
        # Other threads may allocate and copy meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            made = function()
        self._pool = graph.pool()
        return graph.replay, made

    def forget_pool(self) -> None:
        """The graphs are gone, and with them the pool."""
        self._pool = None


@dataclass
class _Kind:
    addresses: tuple[int, ...]
    calls: int = 0
    inputs: tuple[torch.Tensor, ...] = ()
    made: torch.Tensor | None = None
    replay: Replay | None = None


@dataclass
class CallGraphs:
    """The graphs of one model's calls.

    Attributes:
        recorder: makes them.
        calls_before: how many calls of a kind run as ever before one is recorded.
        off: why nothing is recorded any more; empty while it is.
    """

    recorder: Any = field(default_factory=CudaRecorder)
    calls_before: int = _CALLS_BEFORE
    off: str = ""
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

    def drop(self) -> None:
        """Give back all graphs and their memory; calls are counted from 0 again."""
        self._kinds.clear()
        if isinstance(self.recorder, CudaRecorder):
            self.recorder.forget_pool()

    def _find(self, key: Hashable, addresses: tuple[int, ...]) -> _Kind:
        """The kind, now the most recently used, without a graph where its tensors have moved."""
        kind = self._kinds.pop(key, None)
        if kind is None or kind.addresses != addresses:
            kind = _Kind(addresses)
        self._kinds[key] = kind
        if len(self._kinds) > _MOST_KINDS:
            self._kinds.pop(next(iter(self._kinds)))
        return kind

    def _record(self, kind: _Kind, inputs: Sequence[torch.Tensor], function: Callable[..., torch.Tensor]) -> bool:
        """Whether there is a graph now; what cannot be recorded is said once, and nothing is recorded after it."""
        kind.calls += 1
        if kind.calls <= self.calls_before:
            return False
        held = tuple(tensor.clone() for tensor in inputs)
        try:
            kind.replay, kind.made = self.recorder(partial(function, *held))
        except RuntimeError as error:
            # Out of memory, too: without graphs the call may have room, and if it has not, it says so itself.
            self.off = f"{type(error).__name__}: {error}"
            self.drop()
            logger.warning("CUDA graphs are not used any more: recording a call failed. %s", self.off)
            return False
        kind.inputs = held
        return True
