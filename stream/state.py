"""A `PipelineState` that diffusers' `deepcopy` passes through by reference."""

from __future__ import annotations

import copy
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch
from diffusers.modular_pipelines import PipelineState

from ..memory.cleanup import DEFAULT_HANDLING, Handling, handling_table, strip_state
from ..memory.way_back import FREE_WAY_BACK, WayBack


@runtime_checkable
class Rewindable(Protocol):
    """A value of the state that a block changes in place."""

    def remember(self, way: WayBack) -> Callable[[], bool]:
        """Note what it is now; the returned function makes it that again, or says that it cannot.

        What that takes is bounded by `way`, and given back along with the function.
        """


@runtime_checkable
class Snapshottable(Protocol):
    """A value of the state that a snapshot takes by its parts; its class is in the family's `snapshot_kinds`."""

    def to_snapshot(self) -> Mapping[str, Any]:
        """What it consists of: tensors (the snapshot copies them), numbers, strings, lists and dicts of these."""

    @classmethod
    def from_snapshot(cls, parts: Mapping[str, Any], device: torch.device) -> Snapshottable:
        """The same value on `device`. Tensors of `parts` are the snapshot's own, on the CPU: it copies them."""


@dataclass(repr=False)
class StreamState(PipelineState):
    """State of one stream, shared from call to call instead of copied.

    `ModularPipeline.__call__` runs `deepcopy(state)`; here that yields a new state around the same values, so
    caches are neither copied nor held twice. They are mutated in place, so a `StreamState` must not leave its
    session.

    Attributes:
        handling: by key, what is dropped, shared or copied; see `memory/cleanup.py`.
        given_out: this state and its copies, direct or indirect, that are still alive, by identity.
    """

    handling: Mapping[str, Handling] = field(default_factory=handling_table)
    given_out: weakref.WeakValueDictionary[int, StreamState] = field(
        default_factory=weakref.WeakValueDictionary, compare=False
    )

    def __post_init__(self) -> None:
        """Register among the copies."""
        self.given_out[id(self)] = self

    def __deepcopy__(self, memo: dict[int, Any]) -> StreamState:
        values = {
            key: copy.deepcopy(value, memo) if self._handling_of(key) is Handling.COPY else value
            for key, value in self.values.items()
        }
        mapping = {kind: list(keys) for kind, keys in self.kwargs_mapping.items()}
        return StreamState(values, mapping, self.handling, self.given_out)

    def clear(self) -> None:
        """Empty this state and every copy of it that is still alive: a block or a hook may have kept one."""
        for state in list(self.given_out.values()):
            state.values.clear()

    def set(self, key: str, value: Any, kwargs_type: str | None = None) -> None:  # noqa: ANN401
        """Set a value; unlike the base class, each key is listed only once under its `kwargs_type`."""
        self.values[key] = value
        if kwargs_type is not None and key not in self.kwargs_mapping.setdefault(kwargs_type, []):
            self.kwargs_mapping[kwargs_type].append(key)

    def remember(self, way: WayBack = FREE_WAY_BACK) -> Callable[[], bool]:
        """Note the state before a block, which a call of the pipeline copies by reference.

        The returned function makes it that again after a failed call; it returns whether that was possible.

        Args:
            way: what may be kept for it.
        """
        held = list(self.values.values())
        rewinds = [value.remember(way) for value in held if isinstance(value, Rewindable)]
        rewinds += [_remember_queue(value, way) for value in held if isinstance(value, deque)]
        return lambda: all(rewind() for rewind in rewinds)

    def strip(self) -> list[str]:
        """Drop the values that the last block consumed; returns the keys dropped."""
        return strip_state(self.values, self.handling)

    def _handling_of(self, key: str) -> Handling:
        return self.handling.get(key, DEFAULT_HANDLING)


def _remember_queue(queue: deque[Any], way: WayBack) -> Callable[[], bool]:
    """The returned function puts back what a block pushed out, or says that it cannot."""
    newest = queue[-1] if queue else None
    if not (way.on_device or way.ram_bytes):
        return lambda: (queue[-1] if queue else None) is newest
    # Pictures: hundreds of times smaller than the VAE's features.
    before = tuple(queue)

    def rewind() -> bool:
        queue.clear()
        queue.extend(before)
        return True

    return rewind
