"""Where a steady block makes the host wait for the card, and through which calls.

    python benchmarks/host_waits.py [--size 1.3B] [--formats bf16,fp8,int8,int8-weight] [--compile on|off] [--blocks 3]

Random weights. After some blocks, one block is made under torch's debug mode for waits. Each kind of wait is printed
with its count and the Python calls that led to it. Tensors that are formatted as text are listed too; on a CPU, where
nothing waits, they are all there is to see.
"""

from __future__ import annotations

import argparse
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext

import streamblocks_path  # noqa: F401
import torch
from compiled_blocks import compiled
from floors import device_of
from full_size_models import SIZES
from random_pipeline import PROMPT, PipelineOptions, RandomPipeline
from weight_formats import layer_replacement

from streamblocks.memory.cleanup import release_cached_memory
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

# The innermost calls that are shown; their outer ones are the same for every wait.
_SHOWN_CALLS = 14


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="1.3B", help="tiny, 1.3B or 14B")
    parser.add_argument("--formats", default="bf16,fp8,int8")
    parser.add_argument("--resolution", help="832x480, or 96x64 for the tiny model")
    parser.add_argument("--compile", default="on", choices=("on", "off"))
    parser.add_argument("--compile-backend", default="inductor")
    parser.add_argument("--blocks", type=int, default=3, help="made before the one that is counted")
    parser.add_argument("--device", default="auto", help="cuda where there is one, else cpu")
    options = parser.parse_args(arguments)
    device = device_of(options.device)
    for weight_format in options.formats.split(","):
        waits, printed = count_waits(options, weight_format, device)
        print(f"{options.size} {weight_format}, compile {options.compile}: {waits.total()} waits", flush=True)
        _print_kinds("waits", waits)
        _print_kinds("tensors printed", printed)


def count_waits(
    options: argparse.Namespace, weight_format: str, device: torch.device
) -> tuple[Counter[str], Counter[str]]:
    """Waits and printed tensors of one steady block, by the calls that led to them."""
    size = SIZES[options.size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = RandomPipeline(size, PipelineOptions(device, dtype), layer_replacement(weight_format, size))
    resolution = options.resolution or ("96x64" if options.size == "tiny" else "832x480")
    width, height = (int(side) for side in resolution.split("x"))
    settings = StreamSettings(width=width, height=height, blocks=options.blocks + 1, steps=4, kv_policy="recompute")
    choice = compiled(pipeline, backend=options.compile_backend) if options.compile == "on" else nullcontext()
    waits: Counter[str] = Counter()
    printed: Counter[str] = Counter()
    with choice, Session(pipeline, settings) as session:
        for _ in range(options.blocks):
            session.run_block(PROMPT)
        with ExitStack() as stack:
            stack.enter_context(counting_prints(printed))
            if device.type == "cuda":
                stack.enter_context(counting_waits(waits))
            session.run_block(PROMPT)
    pipeline.release()
    release_cached_memory(device)
    return waits, printed


@contextmanager
def counting_waits(found: Counter[str]) -> Iterator[None]:
    """Count what torch warns of as a wait inside the `with` block."""

    def note(message: Warning | str, *_: object, **__: object) -> None:
        if "synchronizing" in str(message):
            found[_calls()] += 1

    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(previous)


@contextmanager
def counting_prints(found: Counter[str]) -> Iterator[None]:
    """Count the tensors that are formatted as text inside the `with` block."""
    before = torch.Tensor.__repr__

    def noted(tensor: torch.Tensor, **contents: str | None) -> str:
        found[f"{tuple(tensor.shape)} {tensor.dtype}\n{_calls()}"] += 1
        return str(before(tensor, **contents))

    setattr(torch.Tensor, "__repr__", noted)  # noqa: B010
    try:
        yield
    finally:
        setattr(torch.Tensor, "__repr__", before)  # noqa: B010


def _calls() -> str:
    """The innermost Python calls, without this file's."""
    calls = [call for call in traceback.extract_stack() if not call.filename.endswith("host_waits.py")]
    return "\n".join(f"{call.filename}:{call.lineno} {call.name}: {call.line}" for call in calls[-_SHOWN_CALLS:])


def _print_kinds(what: str, found: Counter[str]) -> None:
    for calls, count in found.most_common():
        indented = "\n      ".join(calls.splitlines())
        print(f"  {what}: {count} x\n      {indented}", flush=True)


if __name__ == "__main__":
    main()
