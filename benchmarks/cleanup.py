"""The three clean-up policies side by side, and what recording the memory timeline costs.

    python benchmarks/cleanup.py [--size 14B] [--format fp8] [--resolution 832x480] [--blocks 8] [--json]

Random weights: no checkpoint is needed. `--size tiny` is the default off CUDA and takes seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from statistics import median
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from floors import device_of
from full_size_models import SIZES
from random_pipeline import PROMPT, PipelineOptions, RandomPipeline
from weight_formats import FORMATS, layer_replacement

from streamblocks.memory.byte_text import format_bytes
from streamblocks.memory.cleanup import CleanupPolicy
from streamblocks.memory.json_text import json_text
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.memory.recorder import NoRecording, TimelineRecorder
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

# Counted from 0: from the third block on all blocks are alike.
FIRST_STEADY_BLOCK = 2
_METERED_BLOCKS = 3


@dataclass(frozen=True)
class PolicyFigures:
    """One policy.

    Attributes:
        policy: its name.
        block_ms: median of the steady blocks.
        peak: most bytes of tensors at once: by the allocator on CUDA; elsewhere by a separate run under `PeakMeter`,
            without the tensors from before the stream.
        peak_reserved: most bytes the allocator held; None off CUDA.
        reserved_after: bytes it held after the last block; None off CUDA.
    """

    policy: str
    block_ms: float
    peak: int
    peak_reserved: int | None
    reserved_after: int | None


@dataclass(frozen=True)
class Overhead:
    """What recording costs; streams with and without it alternate.

    Attributes:
        mode: "on", or "exact" (all live tensors counted at every stage; where the device has no counters).
        off_ms: median steady block without recording.
        on_ms: with it.
        own_ms: host time inside the recorder, per block. On CUDA most of it passes while the host would wait for the
            card anyway.
    """

    mode: str
    off_ms: float
    on_ms: float
    own_ms: float

    @property
    def share(self) -> float:
        """Of a block, by the recorder's own clock: an upper bound, free of the noise between two streams."""
        return self.own_ms / self.off_ms


def run_blocks(
    pipeline: RandomPipeline,
    settings: StreamSettings,
    recorder: NoRecording | None = None,
    at_end: Callable[[], None] = lambda: None,
) -> list[float]:
    """Seconds of each steady block of one stream; `at_end` is called after the last, before the session closes."""
    seconds = []
    with Session(pipeline, settings, recorder=recorder) as session:
        for index in range(settings.blocks):
            began = time.perf_counter()
            session.run_block(PROMPT)
            if index >= FIRST_STEADY_BLOCK:
                seconds.append(time.perf_counter() - began)
        at_end()
    return seconds


def measure_policy(pipeline: RandomPipeline, settings: StreamSettings, policy: CleanupPolicy) -> PolicyFigures:
    """One stream with `policy`; on other devices than CUDA a second one, shorter, for the peak."""
    settings = replace(settings, cleanup=policy)
    device = pipeline.device
    if device.type != "cuda":
        block_ms = 1000 * median(run_blocks(pipeline, settings))
        with PeakMeter() as meter:
            run_blocks(pipeline, replace(settings, blocks=_METERED_BLOCKS))
        return PolicyFigures(policy.value, block_ms, meter.peak_bytes, None, None)
    torch.cuda.reset_peak_memory_stats(device)
    reserved: list[int] = []
    seconds = run_blocks(pipeline, settings, at_end=lambda: reserved.append(torch.cuda.memory_reserved(device)))
    return PolicyFigures(
        policy.value,
        1000 * median(seconds),
        torch.cuda.max_memory_allocated(device),
        torch.cuda.max_memory_reserved(device),
        reserved[0],
    )


def measure_overhead(pipeline: RandomPipeline, settings: StreamSettings, *, exact: bool, rounds: int = 2) -> Overhead:
    """Streams without and with recording, alternating."""
    off: list[float] = []
    on: list[float] = []
    own = 0.0
    for _ in range(rounds):
        off += run_blocks(pipeline, settings)
        recorder = TimelineRecorder(pipeline.device, exact=exact)
        on += run_blocks(pipeline, settings, recorder)
        own += recorder.own_seconds
    own_ms = 1000 * own / (rounds * settings.blocks)
    return Overhead("exact" if exact else "on", 1000 * median(off), 1000 * median(on), own_ms)


def print_tables(policies: list[PolicyFigures], overheads: list[Overhead]) -> None:
    """Both, as text."""
    print(f"{'policy':<16}{'ms per block':>14}{'peak':>14}{'peak reserved':>16}{'reserved after':>16}")
    for one in policies:
        sizes = [one.peak, one.peak_reserved, one.reserved_after]
        texts = ["-" if size is None else format_bytes(size) for size in sizes]
        print(f"{one.policy:<16}{one.block_ms:>14.1f}{texts[0]:>14}{texts[1]:>16}{texts[2]:>16}")
    print(f"\n{'timeline':<16}{'off, ms':>14}{'recording, ms':>14}{'recorder, ms':>16}{'of a block':>16}")
    for overhead in overheads:
        print(
            f"{overhead.mode:<16}{overhead.off_ms:>14.1f}{overhead.on_ms:>14.1f}{overhead.own_ms:>16.2f}"
            f"{100 * overhead.share:>14.2f} %"
        )


def build(options: argparse.Namespace, device: torch.device) -> RandomPipeline:
    """The pipeline asked for."""
    size = SIZES[options.size or ("14B" if device.type == "cuda" else "tiny")]
    weight_format = options.format or ("fp8" if device.type == "cuda" else "bf16")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return RandomPipeline(size, PipelineOptions(device, dtype), layer_replacement(weight_format, size))


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=tuple(SIZES), help="default: 14B on CUDA, else tiny")
    parser.add_argument("--format", choices=FORMATS, help="default: fp8 on CUDA, else bf16 (float32 on a CPU)")
    parser.add_argument("--resolution", help="width x height, with an x; default: 832x480 on CUDA, else 128x128")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the tables")
    options = parser.parse_args(arguments)
    if options.blocks <= FIRST_STEADY_BLOCK:
        parser.error(f"--blocks is {options.blocks}: at least {FIRST_STEADY_BLOCK + 1} are needed.")
    device = device_of(options.device)
    resolution = options.resolution or ("832x480" if device.type == "cuda" else "128x128")
    width, height = (int(side) for side in resolution.split("x"))
    settings = StreamSettings(width=width, height=height, blocks=options.blocks, steps=options.steps)
    pipeline = build(options, device)
    run_blocks(pipeline, replace(settings, blocks=FIRST_STEADY_BLOCK + 1))  # warms the kernels up, for all
    policies = [measure_policy(pipeline, settings, policy) for policy in CleanupPolicy]
    overheads = [measure_overhead(pipeline, settings, exact=False)]
    if device.type != "cuda":
        overheads.append(measure_overhead(pipeline, settings, exact=True, rounds=1))
    if options.json:
        print(json_text(report(policies, overheads, device)))
    else:
        print_tables(policies, overheads)


def report(policies: list[PolicyFigures], overheads: list[Overhead], device: torch.device) -> dict[str, Any]:
    """Everything as JSON values."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": name,
        "torch": torch.__version__,
        "policies": [asdict(one) for one in policies],
        "timeline": [asdict(one) | {"share": one.share} for one in overheads],
    }


if __name__ == "__main__":
    main()
