"""Hooks on the stages of a block: the leaf blocks of a modular pipeline and the passes of its transformer.

diffusers is not patched. Inside a `with` block each leaf block gets a subclass of its own, because Python looks
`__call__` up on the class; the instance, which diffusers deep-copies, holds no reference to the hooks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from torch import nn


class StageListener(Protocol):
    """Is told when stages of a block begin and end."""

    def begin_stage(self, leaf: str) -> None:
        """The leaf block called `leaf` is about to run."""

    def end_stage(self, leaf: str, state: Any) -> None:  # noqa: ANN401
        """It has run; `state` is the `PipelineState` it wrote to. Not called for a block that raised."""

    def begin_pass(self) -> None:
        """The transformer is about to run."""

    def end_pass(self) -> None:
        """It has run. Not called for a pass that raised."""


class StageHooks:
    """The hooks of one listener.

    Args:
        listener: is told of stages and passes.
    """

    def __init__(self, listener: StageListener) -> None:
        self._listener = listener
        # Made once, not for each block of a stream: a class is costly to make, and only garbage collection frees it.
        self._kinds: dict[tuple[type[Any], str], type[Any]] = {}

    @contextmanager
    def attached(self, pipe: Any) -> Iterator[None]:  # noqa: ANN401
        """Tell the listener of every leaf block of the `ModularPipeline` and every pass of its transformer."""
        leaves = list(leaf_blocks(pipe._blocks))
        kinds = [(leaf, type(leaf)) for _, leaf in leaves]
        transformer = getattr(pipe, "transformer", None)
        hooks = self._hook_passes(transformer) if isinstance(transformer, nn.Module) else []
        try:
            for name, leaf in leaves:
                leaf.__class__ = self._listening_kind(type(leaf), name)
            yield
        finally:
            for leaf, kind in kinds:
                leaf.__class__ = kind
            for hook in hooks:
                hook.remove()

    def _hook_passes(self, transformer: nn.Module) -> list[Any]:
        return [
            transformer.register_forward_pre_hook(lambda *_: self._listener.begin_pass()),
            transformer.register_forward_hook(lambda *_: self._listener.end_pass()),
        ]

    def _listening_kind(self, kind: type[Any], name: str) -> type[Any]:
        listener = self._listener

        def call(block: Any, components: Any, state: Any) -> Any:  # noqa: ANN401
            listener.begin_stage(name)
            result = kind.__call__(block, components, state)
            listener.end_stage(name, state)
            return result

        if (kind, name) not in self._kinds:
            members: dict[str, Callable[..., Any] | str] = {"__call__": call, "__module__": kind.__module__}
            self._kinds[kind, name] = type(kind.__name__, (kind,), members)
        return self._kinds[kind, name]


def leaf_blocks(blocks: Any) -> Iterator[tuple[str, Any]]:  # noqa: ANN401
    """Every block without sub-blocks, with its name, in the order they run."""
    for name, block in blocks.sub_blocks.items():
        if block.sub_blocks:
            yield from leaf_blocks(block)
        else:
            yield name, block
