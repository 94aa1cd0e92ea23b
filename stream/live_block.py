"""What people see and change of a block while it is made."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import torch
from torch import nn

from .block_prompt import BlockPrompt
from .settings import StreamSettings
from .stream_pipeline import StreamPipeline

# Called with pictures of the block that is being decoded, uint8 [F, height, width, 3] on the CPU and not to be written
# to, the place of the first of them in the block, and how many the block has.
ShowPart = Callable[[torch.Tensor, int, int], None]
# What a block is made of: its prompt, and inputs of the pipeline's call.
Revised = tuple[str | BlockPrompt, Mapping[str, Any]]
Revise = Callable[[], Revised]
# How much of a block's passes may be done, at most, when it is begun again. An edit that waits for the next block is
# seen up to two blocks later, and one that begins its block again one block later. So up to the middle of a block
# people gain more than the stream loses; up to here no edit waits for much more than a block.
MOST_DONE = 0.75


@dataclass(frozen=True)
class LiveBlock:
    """How people take part in one block.

    Attributes:
        show: is given the pictures of each latent frame as they are decoded, where the pipeline can; None where nobody
            looks.
        is_edited: whether the block is wanted otherwise than it is being made; asked before each layer, or before each
            pass. None for a block that is not begun again.
        revise: what it is made of when it is begun again; called once, after `is_edited` was true.
        most_done: see `MOST_DONE`.
    """

    show: ShowPart | None = None
    is_edited: Callable[[], bool] | None = None
    revise: Revise | None = None
    most_done: float = MOST_DONE

    def begin_again(self) -> tuple[BlockPrompt, Mapping[str, Any], LiveBlock]:
        """Prompt and inputs of the block, which is not begun again another time."""
        assert self.revise is not None, "is_edited and revise are given together"
        prompt, inputs = self.revise()
        return BlockPrompt.of(prompt), inputs, replace(self, is_edited=None)


# Of which people see no more than its pictures, once it is made.
NOT_LIVE = LiveBlock()


class BlockGivenUpError(BaseException):
    """Raised before a layer or pass to leave a block that is begun again: no `Exception`: nobody takes it for one."""


class LiveAttempt:
    """One call of a pipeline for a live block, which is left before a layer once the block is wanted otherwise.

    Where passes are repeated as a whole it is left before a pass: hooks on layers would end that.

    Args:
        block: which asks for it.
        state: before the block, with the entries of later attempts where the device ran out of memory.
        pipeline: whose transformer has its layers in a list of modules; the block of another is never left.
        settings: of the stream.

    Attributes:
        is_given_up: whether it was left.
    """

    def __init__(
        self, block: LiveBlock, state: Mapping[str, Any], pipeline: StreamPipeline, settings: StreamSettings
    ) -> None:
        self.is_given_up = False
        self._block = block
        self._state = state
        self._transformer = getattr(pipeline.pipe, "transformer", None)
        self._layers = _layers_of(self._transformer)
        self._keys = state.get("kv_cache")
        self._deferred = getattr(self._keys, "deferred", None)
        # Stale keys of the past are computed anew, with the prompt that the block was begun with.
        self._can_undo = pipeline.saving.can_make_again and not state.get("keys_are_stale")
        self._by_pass = pipeline.saving.repeats_passes
        most = block.most_done * settings.passes_per_block
        # Before which so much is done: the third of three passes is begun when two thirds are.
        self._most = ceil(most) if self._by_pass else int(most * len(self._layers))
        self._done = 0
        self._in_pass = False
        # A queue of a quarter of a pass hides how unevenly the host works, and an edit waits no longer for it.
        self._queue = _ShortQueue(pipeline.device, 1 if self._by_pass else len(self._layers) // 4 + 1)

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Hook the transformer, where the block can be begun again; what is in the `with` block may be left."""
        if self._block.is_edited is None or not self._can_undo or not isinstance(self._transformer, nn.Module):
            yield
            return
        hooks = [self._transformer.register_forward_pre_hook(self._before_pass)]
        if not self._by_pass:
            hooks.append(self._transformer.register_forward_hook(self._after_pass))
            hooks += [layer.register_forward_pre_hook(self._before_layer, prepend=True) for layer in self._layers]
        try:
            yield
        except BlockGivenUpError:
            self.is_given_up = True
        finally:
            for hook in hooks:
                hook.remove()

    def _before_pass(self, *_: object) -> None:
        self._in_pass = True
        if self._by_pass:
            self._look()

    def _after_pass(self, *_: object) -> None:
        self._in_pass = False

    def _before_layer(self, *_: object) -> None:
        # Layers are called with a prompt alone, too.
        if self._in_pass:
            self._look()

    def _look(self) -> None:
        if self._done >= self._most:
            return
        self._done += 1
        self._queue.add()
        if self._block.is_edited is not None and self._block.is_edited() and self._is_undoable():
            raise BlockGivenUpError

    def _is_undoable(self) -> bool:
        """Whether what the block has changed so far can be undone."""
        if self._state.get("kv_cache") is not self._keys:
            return False
        # Keys of a deferred block that the first pass has written differ by rounding from those of a pass of its own.
        return self._deferred is None or getattr(self._keys, "deferred", None) is self._deferred


class _ShortQueue:
    """Keeps the host at most some layers or passes ahead of the device, on CUDA: elsewhere nothing is queued.

    The device has work all the time, as long as the host queues one faster than the device computes it.

    Args:
        device: whose current stream is meant.
        most: of them that wait.
    """

    def __init__(self, device: torch.device, most: int) -> None:
        self._device = device
        self._most = most
        self._queued: deque[torch.cuda.Event] = deque()

    def add(self) -> None:
        """One is about to be queued: wait until there is room for it."""
        if self._device.type != "cuda":
            return
        # The thread sleeps meanwhile, so that others may encode pictures.
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        self._queued.append(event)
        if len(self._queued) > self._most:
            self._queued.popleft().synchronize()


def _layers_of(transformer: object) -> list[nn.Module]:
    children = transformer.children() if isinstance(transformer, nn.Module) else ()
    return [layer for child in children if isinstance(child, nn.ModuleList) for layer in child]
