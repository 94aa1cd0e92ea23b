"""Peak bytes of quantizing while loading, beside loading and then quantizing; and the RSS of loading single files.

    python benchmarks/quantized_load.py [--device cuda] [--megabytes 600] [--json] [--hollow-14b]

A synthetic Wan transformer is written to a temporary folder in shards and loaded from there. On a GPU the peak is
the allocator's own (`torch.cuda.max_memory_allocated`), on a CPU the bytes of all tensors alive at once; pages of the
files are the system's cache and do not count.

Then the same transformer is loaded from one `.safetensors` and from one `.pt`, and the process's resident set is shown,
as Linux counts it (`/proc/self/status`, its peak reset through `/proc/self/clear_refs`): what loading added, of that
the anonymous pages and those of mapped files, and its peak. On a CPU the model itself is in it. With `--hollow-14b`
only that is measured, as FP8, for files of the 14B's size whose weights are holes on the disk: 17 GB of memory are
enough.
Beside other work, set OMP_NUM_THREADS=1: OpenMP's threads wait busily for one another, which takes ten times as long
where they have no core of their own.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from diffusers import WanTransformer3DModel
from hollow_files import FOURTEEN_B, write_hollow_files
from quantize_afterwards import quantize_model
from safetensors.torch import load_file

from streamblocks.memory.json_text import json_text
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.memory.tensor_bytes import module_bytes
from streamblocks.ops.quantization import FORMATS, QuantizationSpec
from streamblocks.stream.convert import convert_checkpoint
from streamblocks.wan.checkpoints.components import transformer_component

_STATUS, _CLEAR_REFS = Path("/proc/self/status"), Path("/proc/self/clear_refs")
# Fields of `_STATUS`, and what they are called here.
_RESIDENT = {"VmRSS": "rss", "RssAnon": "anonymous", "RssFile": "mapped"}
SLACK_BYTES = 64 * 2**20
DTYPE = torch.bfloat16
# The 14B's proportions at a third of its width; layers are added until the model is large enough.
HEADS, HEAD_DIM, FFN_DIM = 14, 128, 4864


@dataclass(frozen=True)
class Measured:
    """What one way of loading took."""

    model_bytes: int
    peak_bytes: int


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; 1 when a promised bound does not hold."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--megabytes", type=int, default=600, help="size of the model in BF16, at least 500")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--hollow-14b", action="store_true", help="only the RSS of loading files of the 14B's size")
    options = parser.parse_args(arguments)
    if options.hollow_14b:
        with tempfile.TemporaryDirectory() as folder:
            files = write_hollow_files(Path(folder), FOURTEEN_B)
            print("\n".join(_file_lines(load_files(files, torch.device(options.device), ["fp8"]))))
        return 0
    if options.megabytes < 500:
        parser.error(f"--megabytes is {options.megabytes}: give 500 or more.")
    with tempfile.TemporaryDirectory() as folder:
        device = torch.device(options.device)
        write_transformer(Path(folder), options.megabytes * 10**6)
        result = compare(Path(folder), device)
        result["files"] = compare_files(Path(folder), device) if _STATUS.exists() else []
    print(json_text(result) if options.json else table(result))
    return 0 if all(_holds(result, name) for name in FORMATS) else 1


def write_transformer(folder: Path, least_bytes: int) -> None:
    """Write a random BF16 transformer of at least `least_bytes` into `folder / "transformer"`, in shards."""

    def build(layers: int, device: str) -> WanTransformer3DModel:
        with torch.device(device):
            return WanTransformer3DModel(
                num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, ffn_dim=FFN_DIM, num_layers=layers
            )

    sizes = [sum(parameter.numel() * 2 for parameter in build(layers, "meta").parameters()) for layers in (1, 2)]
    layers = 1 + max(0, math.ceil((least_bytes - sizes[0]) / (sizes[1] - sizes[0])))
    transformer = build(layers, "cpu").to(DTYPE)
    transformer.save_pretrained(folder / "transformer", max_shard_size=f"{least_bytes // 5000}KB")


def compare(folder: Path, device: torch.device) -> dict[str, Any]:
    """Load the transformer of `folder` in each way, and measure."""
    plain = transformer_component(folder, dtype=DTYPE, quantization=QuantizationSpec("fp8")).plan
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "bf16_model_bytes": measure(partial(_load, folder, None, device), device).model_bytes,
        "largest_layer_bytes": max(math.prod(layer.shape) * DTYPE.itemsize for layer in plain.layers),
    }
    for format_ in FORMATS:
        spec = QuantizationSpec(format_)
        on_the_way = measure(partial(_load, folder, spec, device), device)
        afterwards = measure(partial(_load_then_quantize, folder, spec, device), device)
        result[format_] = {
            "model_bytes": on_the_way.model_bytes,
            "peak_bytes": on_the_way.peak_bytes,
            "load_then_quantize_peak_bytes": afterwards.peak_bytes,
        }
    return result


def compare_files(folder: Path, device: torch.device) -> list[dict[str, Any]]:
    """Load the transformer of `folder` from a single file of each format, as it is and as FP8."""
    plain = convert_checkpoint(folder, folder / "wan.safetensors", on_progress=lambda done, total: None)
    pickled = folder / "wan.pt"
    torch.save({"generator_ema": load_file(plain)}, pickled)
    return load_files((plain, pickled), device, [None, "fp8"])


def load_files(paths: Sequence[Path], device: torch.device, formats: Sequence[str | None]) -> list[dict[str, Any]]:
    """Load the transformer of each file in each format, None for as it is."""
    return [
        {"file": path.name, "format": format_ or "bf16", **resident(partial(_load, path, _spec(format_), device))}
        for path in paths
        for format_ in formats
    ]


def resident(load: Callable[[], torch.nn.Module]) -> dict[str, float]:
    """Bytes of the module of `load`, by which the resident set grew when it is loaded, and at most; seconds."""
    gc.collect()
    # What was freed must not be there to be used again: it would not count.
    ctypes.CDLL(None).malloc_trim(0)
    _CLEAR_REFS.write_text("5")
    before = {name: _status_bytes(name) for name in _RESIDENT}
    began = time.perf_counter()
    module = load()
    seconds = time.perf_counter() - began
    added = {f"added_{name}_bytes": _status_bytes(field) - before[field] for field, name in _RESIDENT.items()}
    peak = _status_bytes("VmHWM") - before["VmRSS"]
    return {"model_bytes": module_bytes(module), **added, "peak_rss_bytes": peak, "seconds": seconds}


def _status_bytes(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def measure(load: Callable[[], torch.nn.Module], device: torch.device) -> Measured:
    """The bytes of the module that `load` makes, and the peak while it does."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        module = load()
        torch.cuda.synchronize(device)
        return Measured(module_bytes(module), torch.cuda.max_memory_allocated(device) - before)
    with PeakMeter() as meter:
        module = load()
    return Measured(module_bytes(module), meter.peak_bytes)


def table(result: dict[str, Any]) -> str:
    """The result as text."""
    mega = 1e6
    lines = [
        f"{result['device']}: BF16 model {result['bf16_model_bytes'] / mega:.1f} MB, largest layer "
        f"{result['largest_layer_bytes'] / mega:.1f} MB",
        f"{'':8}{'model MB':>10}{'peak MB':>10}{'bound MB':>10}  {'holds':5}{'load, then quantize MB':>24}",
    ]
    for name in FORMATS:
        row = result[name]
        lines.append(
            f"{name:8}{row['model_bytes'] / mega:10.1f}{row['peak_bytes'] / mega:10.1f}"
            f"{_bound(result, name) / mega:10.1f}  {'yes' if _holds(result, name) else 'NO':5}"
            f"{row['load_then_quantize_peak_bytes'] / mega:24.1f}"
        )
    lines += _file_lines(result.get("files", []))
    return "\n".join(lines)


def _file_lines(files: Sequence[Mapping[str, Any]]) -> list[str]:
    return [
        f"{file['file']:18} {file['format']:5} model {file['model_bytes'] / 1e6:8.1f} MB, RSS grew by "
        f"{file['added_rss_bytes'] / 1e6:8.1f} MB (anonymous {file['added_anonymous_bytes'] / 1e6:.1f}, of files "
        f"{file['added_mapped_bytes'] / 1e6:.1f}), at most by {file['peak_rss_bytes'] / 1e6:8.1f} MB, in "
        f"{file['seconds']:.0f} s"
        for file in files
    ]


def _spec(format_: str | None) -> QuantizationSpec | None:
    return None if format_ is None else QuantizationSpec(format_)


def _load(source: Path, spec: QuantizationSpec | None, device: torch.device) -> torch.nn.Module:
    return transformer_component(source, dtype=DTYPE, quantization=spec).load(device)


def _load_then_quantize(folder: Path, spec: QuantizationSpec, device: torch.device) -> torch.nn.Module:
    transformer = _load(folder, None, device)
    quantize_model(transformer, transformer_component(folder, dtype=DTYPE, quantization=spec).plan)
    return transformer


def _bound(result: dict[str, Any], name: str) -> int:
    return int(result[name]["model_bytes"]) + int(result["largest_layer_bytes"]) + SLACK_BYTES


def _holds(result: dict[str, Any], name: str) -> bool:
    return int(result[name]["peak_bytes"]) <= _bound(result, name)


if __name__ == "__main__":
    sys.exit(main())
