"""Raises an error at a chosen stage of a stream, and counts what a stream leaves behind."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from streamblocks.memory.stage_hooks import StageHooks
from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.stream import block_result
from streamblocks.stream.snapshot import StreamSnapshot

ALWAYS = 10**9


def out_of_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory.")


@dataclass
class Fault:
    """Raises `times` times in a row, once it is armed.

    Attributes:
        error: makes what is raised.
        times: how often.
        armed: whether it waits for its stage.
        raised: how often it has raised.
    """

    error: Callable[[], BaseException]
    times: int = 1
    armed: bool = False
    raised: int = 0

    def strike(self) -> None:
        """Raise, or not."""
        if self.armed and self.raised < self.times:
            self.raised += 1
            raise self.error()


class _Leaf:
    """Follows which leaf block of a pipeline runs."""

    def __init__(self) -> None:
        self.name = ""

    def begin_stage(self, leaf: str) -> None:
        self.name = leaf

    def end_stage(self, leaf: str, state: Any) -> None:
        self.name = ""

    def begin_pass(self) -> None:
        """Nothing: a fault strikes within a pass."""

    def end_pass(self) -> None:
        """Nothing."""


# Deep inside: what comes before has changed the caches by then.
_DEEP: Mapping[str, Callable[[Any], nn.Module]] = {
    "text_encoder": lambda pipe: pipe.text_encoder.encoder.final_layer_norm,
    "prepare_caches": lambda pipe: pipe.transformer.blocks[-1],
    "encode_input": lambda pipe: pipe.vae.encoder.mid_block,
    "refill_context": lambda pipe: pipe.transformer.blocks[-1],
    "denoise_block": lambda pipe: pipe.transformer.blocks[-1].ffn,
    "remember_block": lambda pipe: pipe.transformer.blocks[-1],
    "decode": lambda pipe: pipe.vae.decoder.up_blocks[-1].resnets[0],
    "start pictures": lambda pipe: pipe.vae.decoder.up_blocks[-1].resnets[0],
}
# Where no module runs: what is called.
_PATCHED: Mapping[str, Callable[[Any], tuple[Any, str]]] = {
    "loading": lambda pipeline: (pipeline, "bring_components"),
    "past": lambda pipeline: (StreamSnapshot, "start_entries"),
    "pictures": lambda pipeline: (block_result, "to_uint8_frames"),
}
IN_A_BLOCK = tuple(name for name in _DEEP if name not in ("text_encoder", "start pictures"))


@contextmanager
def struck(pipeline: Any, stage: str, fault: Fault) -> Iterator[None]:
    """Have `fault` strike within a stage of a pipeline that is loaded.

    Args:
        pipeline: built in.
        stage: as sessions name it.
        fault: what strikes.
    """
    if stage in _PATCHED:
        owner, name = _PATCHED[stage](pipeline)
        work = getattr(owner, name)

        def work_or_fail(*arguments: Any, **named: Any) -> Any:
            fault.strike()
            return work(*arguments, **named)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, work_or_fail)
            yield
        return
    leaf = _Leaf()
    hook = _DEEP[stage](pipeline.pipe).register_forward_pre_hook(
        lambda *_: fault.strike() if stage not in IN_A_BLOCK or leaf.name == stage else None
    )
    try:
        with StageHooks(leaf).attached(pipeline.pipe):
            yield
    finally:
        hook.remove()


@dataclass(frozen=True)
class Alive:
    """What a process holds: equal before and after a stream that leaves nothing behind."""

    tensor_bytes: int
    hooks: int
    threads: int
    files: tuple[str, ...]

    @classmethod
    def now(cls, pipeline: Any = None) -> Alive:
        """Counted after a garbage collection; hooks of the pipeline's modules."""
        gc.collect()
        parts = [] if pipeline is None else pipeline.pipe.components.values()
        modules = [module for part in parts if isinstance(part, nn.Module) for module in part.modules()]
        hooks = sum(len(module._forward_pre_hooks) + len(module._forward_hooks) for module in modules)
        return cls(live_tensor_bytes(), hooks, threading.active_count(), _open_files())


def _open_files() -> tuple[str, ...]:
    """Names of the regular files that are open."""
    names = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            name = str(entry.readlink())
        except OSError:
            continue
        if name.startswith("/") and not name.startswith(("/dev/", "/proc/")) and Path(name.split(" ")[0]).suffix:
            names.append(name)
    return tuple(sorted(names))
