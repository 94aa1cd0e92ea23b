"""Plain `state = pipe(state, ...)` loop beside the session: bytes copied, peak bytes, time per call, growth.

    python benchmarks/state_copy.py [--model FOLDER] [--blocks 6] [--width 128] [--height 128] [--json]

Without `--model` it uses the tiny random model. Both loops run the same pipeline from the same seed.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from deepcopied_tensors import count_deepcopied_tensors
from diffusers.modular_pipelines import PipelineState

from streamblocks.memory.json_text import json_text
from streamblocks.memory.tensor_bytes import held_tensor_bytes, live_tensor_bytes
from streamblocks.stream.frames import to_uint8_frames
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.stream_pipeline import StreamPipeline
from streamblocks.wan.tiny_model import write_tiny_model

PROMPT = "a red fox runs through fresh snow"


@dataclass
class LoopFigures:
    """What one loop did.

    Attributes:
        copied: bytes deep-copied in each call.
        peak: largest number of tensor bytes alive before any pass of the transformer.
        seconds: of each call, measured in a run of its own.
        frames: of all blocks, uint8.
    """

    copied: list[int] = field(default_factory=list)
    peak: int = 0
    seconds: list[float] = field(default_factory=list)
    frames: list[torch.Tensor] = field(default_factory=list)


CallBlock = Callable[[int], torch.Tensor]


@contextmanager
def plain_loop(
    pipeline: StreamPipeline, settings: StreamSettings, on_state: Callable[[PipelineState], None] | None = None
) -> Iterator[CallBlock]:
    """The loop users write: diffusers' own state, passed back into each call; `on_state` gets each state returned."""
    state = PipelineState()
    generator = pipeline.make_generator(settings.seed)
    known = pipeline.pipe.blocks.input_names
    inputs = {name: value for name, value in settings.pipeline_inputs().items() if name in known}

    def call(index: int) -> torch.Tensor:
        nonlocal state
        state = pipeline.pipe(state, prompt=[PROMPT], block_idx=index, generator=generator, **inputs)
        if on_state is not None:
            on_state(state)
        return to_uint8_frames(state.values["videos"])

    yield call


@contextmanager
def session_loop(pipeline: StreamPipeline, settings: StreamSettings) -> Iterator[CallBlock]:
    """The session."""
    with Session(pipeline, settings) as session:
        yield lambda _: session.run_block(PROMPT).frames


@contextmanager
def watch_peak(pipeline: StreamPipeline, figures: LoopFigures) -> Iterator[None]:
    """Count live tensor bytes before each transformer pass: after the deepcopy, inside the call."""

    def look(*_: Any) -> None:  # noqa: ANN401
        figures.peak = max(figures.peak, live_tensor_bytes())

    hook = pipeline.pipe.transformer.register_forward_pre_hook(look)
    try:
        yield
    finally:
        hook.remove()


def measure(loop: Callable[..., Any], pipeline: StreamPipeline, settings: StreamSettings) -> LoopFigures:
    """Run the loop twice: once counting bytes, once undisturbed for the time."""
    figures = LoopFigures()
    with loop(pipeline, settings) as call, watch_peak(pipeline, figures):
        for index in range(settings.blocks):
            with count_deepcopied_tensors() as count:
                figures.frames.append(call(index))
            figures.copied.append(count.bytes)
    with loop(pipeline, settings) as call:
        for index in range(settings.blocks):
            began = time.perf_counter()
            call(index)
            figures.seconds.append(time.perf_counter() - began)
    return figures


@contextmanager
def keeping_loop(pipeline: StreamPipeline, settings: StreamSettings) -> Iterator[CallBlock]:
    """The plain loop in a graph: a node that returns the state, whose outputs ComfyUI keeps."""
    kept: list[PipelineState] = []
    with plain_loop(pipeline, settings, kept.append) as call:
        yield call


def measure_growth(loop: Callable[..., Any], pipeline: StreamPipeline, settings: StreamSettings) -> list[int]:
    """Growth in bytes of the tensors alive between calls, from the second call on."""
    with loop(pipeline, settings) as call:
        live = []
        for index in range(settings.blocks):
            call(index)
            live.append(live_tensor_bytes(collect=False))
    return [after - before for before, after in itertools.pairwise(live)]


def state_by_key(pipeline: StreamPipeline, settings: StreamSettings) -> dict[str, int]:
    """Bytes of each key of the plain loop's state after the last block."""
    states: list[PipelineState] = []
    with plain_loop(pipeline, settings, lambda state: states.__setitem__(slice(None), [state])) as call:
        for index in range(settings.blocks):
            call(index)
    held = {key: held_tensor_bytes(value) for key, value in states[0].values.items()}
    return {key: size for key, size in sorted(held.items(), key=lambda item: -item[1]) if size}


def summarise(plain: LoopFigures, stream: LoopFigures) -> dict[str, Any]:
    """The figures of both; per call means the median over the blocks after the first, which has no state yet."""
    return {
        "plain_copied_bytes_per_call": int(statistics.median(plain.copied[1:])),
        "stream_copied_bytes_per_call": int(statistics.median(stream.copied[1:])),
        "plain_peak_bytes": plain.peak,
        "stream_peak_bytes": stream.peak,
        "plain_ms_per_call": round(1000 * statistics.median(plain.seconds[1:]), 2),
        "stream_ms_per_call": round(1000 * statistics.median(stream.seconds[1:]), 2),
        "frames_equal": all(torch.equal(a, b) for a, b in zip(plain.frames, stream.frames, strict=True)),
    }


def print_table(result: dict[str, Any]) -> None:
    """Both columns side by side."""
    rows = [("", "plain loop", "session")]
    for label, key in (("copied bytes per call", "copied_bytes_per_call"), ("peak tensor bytes", "peak_bytes")):
        rows.append((label, f"{result[f'plain_{key}']:,}", f"{result[f'stream_{key}']:,}"))
    rows.append(("ms per call", str(result["plain_ms_per_call"]), str(result["stream_ms_per_call"])))
    for label, plain, stream in rows:
        print(f"{label:<24}{plain:>18}{stream:>18}")
    print(f"frames bitwise equal: {result['frames_equal']}")
    print("\nwhat the plain loop copies in the last call, by key:")
    for key, size in result["plain_state_bytes_by_key"].items():
        print(f"{key:<28}{size:>14,}")
    print("\ngrowth of live tensor bytes from the third call on, per call:")
    for name, growth in result["growth_bytes"].items():
        print(f"{name:<28}{growth[-1]:>14,}")


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a diffusers-layout folder; default: the tiny random model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--height", type=int, default=128)
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    options = parser.parse_args()
    if options.blocks < 2:
        parser.error(f"--blocks is {options.blocks}: at least 2 are needed, the first has no state to copy.")
    with tempfile.TemporaryDirectory() as folder:
        model = str(Path(options.model or write_tiny_model(Path(folder) / "tiny")).absolute())
        default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        pipeline = materialise(Recipe(model=model, device=options.device), default_device=default)
        settings = StreamSettings(width=options.width, height=options.height, blocks=options.blocks)
        with session_loop(pipeline, settings) as call:
            call(0)  # loads the components and warms the kernels up, for both
        plain = measure(plain_loop, pipeline, settings)
        stream = measure(session_loop, pipeline, settings)
        result = summarise(plain, stream)
        loops = {"plain loop": plain_loop, "states kept": keeping_loop, "session": session_loop}
        result["growth_bytes"] = {name: measure_growth(loop, pipeline, settings) for name, loop in loops.items()}
        result["plain_state_bytes_by_key"] = state_by_key(pipeline, settings)
    if options.json:
        print(json_text(result))
    else:
        print_table(result)


if __name__ == "__main__":
    main()
