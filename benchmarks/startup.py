"""Seconds to the first compiled block in a new process: with an empty cache of compiled code, then with a full one.

    python benchmarks/startup.py [--size tiny|1.3B|14B] [--formats bf16,fp8,int8] [--resolution 96x64] [--blocks 4]

Random weights. Each format runs in two processes, one after the other, which share a new folder for torch.compile's
and Triton's code: the first finds it empty. How often torch found its graphs in the cache is counted, and why it did
not look. A graph without a past and one with are compiled, by blocks 1 and 2.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# The child counts from its start, before anything heavy is imported.
_ENTERED = time.time()
_STARTED_AT = "STARTUP_BENCHMARK_STARTED_AT"
_MARK = "startup figures: "
_COUNTED = {
    "inductor": ("fxgraph_cache_hit", "fxgraph_cache_miss", "fxgraph_cache_bypass"),
    "aot_autograd": ("autograd_cache_hit", "autograd_cache_miss", "autograd_cache_bypass"),
}


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", default="tiny", help="tiny, 1.3B or 14B")
    parser.add_argument("--formats", default="bf16", help="as those of full_size.py, separated by commas")
    parser.add_argument("--resolution", help="832x480, or 96x64 for the tiny model")
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--device", default="auto", help="cuda where there is one, else cpu")
    parser.add_argument("--limit", type=int, default=300, help="seconds that one process may take")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(_MARK + json.dumps(measure(options)), flush=True)
        return
    for weight_format in options.formats.split(","):
        with tempfile.TemporaryDirectory(prefix="startup_") as folder:
            for cache in ("cold", "warm"):
                figures = run_child(options, weight_format, Path(folder))
                print(f"{options.size} {weight_format}, {cache} cache: {_line(figures)}", flush=True)


def run_child(options: argparse.Namespace, weight_format: str, folder: Path) -> dict[str, Any]:
    """The figures of one process that compiles into `folder`; {"error": ...} where there are none."""
    command = [sys.executable, __file__, "--child", "--size", options.size, "--formats", weight_format]
    command += ["--blocks", str(options.blocks)]
    for name in ("resolution", "device"):
        if getattr(options, name):
            command += [f"--{name}", getattr(options, name)]
    environment = os.environ | {
        "TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"),
        "TRITON_CACHE_DIR": str(folder / "triton"),
        _STARTED_AT: repr(time.time()),
    }
    try:
        run = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=options.limit, check=False
        )
    except subprocess.TimeoutExpired:
        return {"error": f"no end within {options.limit} s"}
    found = [line for line in run.stdout.splitlines() if line.startswith(_MARK)]
    if not found:
        return {"error": run.stderr[-2000:]}
    figures: dict[str, Any] = json.loads(found[-1].removeprefix(_MARK))
    return figures


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """In the child: seconds since the process was started, by what was reached, and the caches' counters."""
    started = float(os.environ.get(_STARTED_AT, _ENTERED))
    reached: dict[str, float] = {}

    def reach(name: str) -> None:
        reached[name] = round(time.time() - started, 2)

    reasons = _reasons_for_misses()
    _stream(options, reach)
    from torch._dynamo.utils import counters

    counted = {name: int(counters[group][name]) for group, names in _COUNTED.items() for name in names}
    counted["graphs"] = int(counters["stats"]["unique_graphs"])
    return {"seconds": reached, "counters": counted, "reasons": sorted(set(reasons))}


def _stream(options: argparse.Namespace, reach: Callable[[str], None]) -> None:
    """A stream of some blocks; `reach` is called after each stage."""
    import streamblocks_path  # noqa: F401
    import torch
    from compiled_blocks import compiled
    from floors import device_of
    from full_size_models import SIZES
    from random_pipeline import PROMPT, PipelineOptions, RandomPipeline
    from weight_formats import layer_replacement

    from streamblocks.stream.session import Session
    from streamblocks.stream.settings import StreamSettings

    reach("imported")
    device, size = device_of(options.device), SIZES[options.size]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    pipeline = RandomPipeline(size, PipelineOptions(device, dtype), layer_replacement(options.formats, size))
    resolution = options.resolution or ("96x64" if options.size == "tiny" else "832x480")
    width, height = (int(side) for side in resolution.split("x"))
    settings = StreamSettings(width=width, height=height, blocks=options.blocks, steps=4, kv_policy="recompute")
    reach("weights made")
    with compiled(pipeline, backend="inductor"), Session(pipeline, settings) as session:
        for index in range(options.blocks):
            # The block's pictures are on the CPU afterwards, so the device is done.
            session.run_block(PROMPT)
            reach(f"block {index + 1}")


def _reasons_for_misses() -> list[str]:
    """Filled with what torch logs when it does not look into a cache."""
    reasons: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            message = record.getMessage()
            if "ypass" in message:
                reasons.append(message.splitlines()[0][:300])

    for name in ("torch._functorch._aot_autograd.autograd_cache", "torch._inductor.codecache"):
        logger = logging.getLogger(name)
        logger.setLevel(logging.INFO)
        logger.addHandler(Keep(logging.INFO))
        logger.propagate = False
    return reasons


def _line(figures: dict[str, Any]) -> str:
    if "error" in figures:
        return f"failed: {figures['error']}"
    seconds: dict[str, float] = figures["seconds"]
    before, parts = 0.0, []
    for name, at in seconds.items():
        parts.append(f"{name} +{at - before:.2f} s")
        before = at
    counted = ", ".join(f"{name} {count}" for name, count in figures["counters"].items())
    lines = [f"first block after {seconds['block 1']:.2f} s ({', '.join(parts)})", counted]
    return "\n  ".join([*lines, *(f"not cached: {reason}" for reason in figures["reasons"])])


if __name__ == "__main__":
    main()
