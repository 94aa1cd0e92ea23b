"""Stream a pipeline and measure it: time by stage, memory by block, host synchronisations, recompilations."""

from __future__ import annotations

import gc
import re
import time
import warnings
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from deepcopied_tensors import count_deepcopied_tensors
from diffusers.modular_pipelines import PipelineState
from random_pipeline import PROMPT, RandomPipeline
from stage_timer import StageTimer
from torch import nn
from torch.profiler import ProfilerActivity, profile

from streamblocks.stream.frames import to_uint8_frames
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

_SYNC_WARNING = re.compile("synchronizing")


@dataclass(frozen=True)
class BlockFigures:
    """One block. Bytes are of the device, after the block (`peak`: during it); None where not counted."""

    seconds: float
    pictures: int
    stages: dict[str, float]
    allocated: int
    reserved: int | None
    peak: int | None
    graphs: int


@dataclass
class StreamFigures:
    """A whole stream.

    Attributes:
        blocks: in order.
        first_steady: the first block whose window has slid, counted from 0: from there on all blocks are alike.
        host_syncs: how often one steady block made the host wait, by place; None where not counted.
        mean_value: of the last block's pictures, 0..255.
        profile_file: where the profile was written.
    """

    blocks: list[BlockFigures] = field(default_factory=list)
    first_steady: int = 2
    host_syncs: dict[str, int] | None = None
    mean_value: float = 0.0
    profile_file: str | None = None

    @property
    def steady(self) -> list[BlockFigures]:
        """From `first_steady` on."""
        return self.blocks[self.first_steady :] or self.blocks[-1:]

    def summary(self) -> dict[str, Any]:
        """The figures that the table shows."""
        steady = self.steady
        return {
            "blocks": len(self.blocks),
            "first_block_seconds": self.blocks[0].seconds,
            "fps": sum(block.pictures for block in steady) / sum(block.seconds for block in steady),
            "first_steady": self.first_steady,
            "block_ms": 1000 * median(block.seconds for block in steady),
            "stages_ms": _median_stages(steady),
            "allocated": self.blocks[-1].allocated,
            "reserved": self.blocks[-1].reserved,
            "peak": max((block.peak for block in self.blocks if block.peak is not None), default=None),
            "steady_peak": max((block.peak for block in steady if block.peak is not None), default=None),
            "growth_bytes": [block.allocated - steady[0].allocated for block in steady[1:]],
            "recompiles_after_block_2": self.blocks[-1].graphs - self.blocks[:2][-1].graphs,
            "graphs": self.blocks[-1].graphs,
            "host_syncs": None if self.host_syncs is None else sum(self.host_syncs.values()),
            "sync_places": self.host_syncs,
            "mean_value": self.mean_value,
            "profile_file": self.profile_file,
            "per_block": [asdict(block) for block in self.blocks],
        }


def run_stream(
    pipeline: RandomPipeline, settings: StreamSettings, *, deadline: float, profile_to: Path | None = None
) -> StreamFigures:
    """Stream `settings.blocks` blocks, fewer when `deadline` (of `time.monotonic`) passes, then the extra ones.

    The extra blocks are one in which synchronisations are counted (CUDA only) and, if asked for, one profiled.
    """
    figures = StreamFigures(first_steady=first_steady_block(settings))
    timer = StageTimer(pipeline.device)
    with Session(pipeline, settings) as session, timer.attached(pipeline.pipe):
        for index in range(settings.blocks):
            if index > figures.first_steady and time.monotonic() > deadline:
                break
            _add_block(figures, session, timer)
        if pipeline.device.type == "cuda":
            figures.host_syncs = _count_syncs(session)
        timer.take()
        if profile_to is not None:
            _profile_block(session, timer, profile_to)
            figures.profile_file = str(profile_to)
    return figures


def first_steady_block(settings: StreamSettings) -> int:
    """The first block whose window has slid, counted from 0."""
    return 1 + settings.context_frames // settings.frames_per_block


def _add_block(figures: StreamFigures, session: Session, timer: StageTimer) -> None:
    device = session.pipeline.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    block = session.run_block(PROMPT)
    seconds, pictures = block.seconds, block.frames.shape[0]
    figures.mean_value = float(block.frames[-1].float().mean())
    del block
    allocated, reserved, peak = read_memory(device)
    figures.blocks.append(
        BlockFigures(
            seconds=seconds,
            pictures=pictures,
            stages=table_stages(timer.take(), 1000 * seconds),
            allocated=allocated,
            reserved=reserved,
            peak=peak,
            graphs=compiled_graphs(),
        )
    )


def table_stages(spans: dict[str, float], block_ms: float) -> dict[str, float]:
    """Map the timer's spans to the stages of the table; `rest` is the block's time outside all of them."""
    named = {"context": "refill_context/pass 0", "remember": "remember_block", "decode": "decode"}
    stages = {stage: spans[span] for stage, span in named.items() if span in spans}
    if "context" in stages:
        stages["encode"] = spans["refill_context"] - stages["context"]
    for name, milliseconds in spans.items():
        if name.startswith("denoise_block/pass "):
            stages[f"step {name.rsplit(' ', 1)[-1]}"] = milliseconds
    return stages | {"rest": block_ms - sum(stages.values())}


def read_memory(device: torch.device) -> tuple[int, int | None, int | None]:
    """Allocated, reserved and peak bytes; on other devices than CUDA the bytes of live tensors."""
    if device.type != "cuda":
        return _live_bytes(device), None, None
    return (
        # Requested bytes: the allocator's "allocated" jumps by up to a megabyte with how it splits blocks.
        torch.cuda.memory_stats(device)["requested_bytes.all.current"],
        torch.cuda.memory_reserved(device),
        torch.cuda.max_memory_allocated(device),
    )


def _live_bytes(device: torch.device) -> int:
    """Bytes of the plain tensors alive on the device; compiled code keeps tensors without storage."""
    gc.collect()
    plain = [obj for obj in gc.get_objects() if type(obj) in (torch.Tensor, nn.Parameter)]
    storages = [tensor.untyped_storage() for tensor in plain if tensor.device.type == device.type]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def compiled_graphs() -> int:
    """Graphs that torch.compile has made in this process since the last reset."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _count_syncs(session: Session) -> dict[str, int]:
    """Where one block makes the host wait, and how often."""
    previous = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            session.run_block(PROMPT)
        finally:
            torch.cuda.set_sync_debug_mode(previous)
    found = [warning for warning in caught if _SYNC_WARNING.search(str(warning.message))]
    return dict(Counter(f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}" for w in found))


def _profile_block(session: Session, timer: StageTimer, target: Path) -> None:
    """Profile one block; writes the costliest kernels and the device time of each stage."""
    on_cuda = timer.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    timer.ranges = True
    with profile(activities=activities) as profiler:
        session.run_block(PROMPT)
    timer.ranges = False
    timer.take()
    averages = profiler.key_averages()
    column = "device_time_total" if on_cuda else "cpu_time_total"
    stages = [event for event in averages if event.key.startswith("stage: ")]
    lines = [f"{event.key:<32}{getattr(event, column) / 1000:>12.2f} ms" for event in stages]
    waits = [event for event in averages if "Synchronize" in event.key]
    lines += [f"{event.key:<32}{event.count:>12} calls" for event in waits]
    order = "self_device_time_total" if on_cuda else "self_cpu_time_total"
    table = averages.table(sort_by=order, row_limit=25, max_name_column_width=90)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("\n".join([*lines, "", table]), encoding="utf-8")


def _median_stages(blocks: Iterable[BlockFigures]) -> dict[str, float]:
    times: dict[str, list[float]] = {}
    for block in blocks:
        for stage, milliseconds in block.stages.items():
            times.setdefault(stage, []).append(milliseconds)
    return {stage: median(values) for stage, values in times.items()}


def run_plain_loop(pipeline: RandomPipeline, settings: StreamSettings, blocks: int) -> dict[str, Any]:
    """The loop users write, `state = pipe(state, ...)`: bytes copied and milliseconds per call, peak, growth."""
    device = pipeline.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    state = PipelineState()
    for key, value in pipeline.start(settings).items():
        state.set(key, value)
    generator = pipeline.make_generator(settings.seed)
    copied, seconds, allocated = [], [], []
    for index in range(blocks):
        began = time.perf_counter()
        with count_deepcopied_tensors() as count:
            state = pipeline.pipe(state, **_plain_inputs(pipeline, settings, index, generator))
        to_uint8_frames(state.values["videos"])
        seconds.append(time.perf_counter() - began)
        copied.append(count.bytes)
        allocated.append(read_memory(device)[0])
    steady = seconds[first_steady_block(settings) :] or seconds[-1:]
    return {
        "blocks": blocks,
        "fps": 4 * settings.frames_per_block * len(steady) / sum(steady),
        "copied_bytes_per_call": copied,
        "block_ms": 1000 * median(steady),
        "peak": read_memory(device)[2],
        "growth_bytes": [later - allocated[0] for later in allocated[1:]],
    }


def _plain_inputs(
    pipeline: RandomPipeline, settings: StreamSettings, index: int, generator: torch.Generator
) -> dict[str, Any]:
    inputs = settings.pipeline_inputs() | {"prompt": [PROMPT], "block_idx": index, "generator": generator}
    known = pipeline.pipe.blocks.input_names
    return {name: value for name, value in inputs.items() if name in known}
