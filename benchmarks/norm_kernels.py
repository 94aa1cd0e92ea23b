"""The layers' norms on one card, as torch compiles them and by the kernel `layer_norm`: errors, time, and the floor.

    python benchmarks/norm_kernels.py                          # all shapes and formats; about a minute on an H200
    python benchmarks/norm_kernels.py --shapes 14B --formats fp8 --json norms.json
    python benchmarks/norm_kernels.py --device cpu --shapes tiny   # what runs on a CPU: torch beside torch

Needs neither diffusers nor a checkpoint. A call is timed in a CUDA graph of calls over several sets of inputs, larger
than the cache; medians. "layer" is all that lies between a layer's products: three norms, their residuals, and the last
residual. The floor is each input read and each output written once, at the copy rate of the same run. Errors are
|made - exact| / |exact| against float64; for FP8 that is mostly the rounding to 3 bits.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import streamblocks_path  # noqa: F401
import torch
from norm_forms import EPSILON, FORMS, Inputs, Shape, draw, largest_error, new_way, old_way, quantize

from streamblocks.memory.json_text import json_text
from streamblocks.ops.fp8_linear import QuantizedRows
from streamblocks.ops.kernels import layer_norm_launch
from streamblocks.ops.kernels.layer_norm_launch import LAYER_NORM, LayerNormVariant, RowScaling
from streamblocks.ops.normed_rows import add_and_norm

SHAPES = {"14B": (1, 4680, 5120), "1.3B": (1, 4680, 1536), "14B fused": (2, 4680, 5120), "tiny": (2, 24, 40)}
FORMATS = ("fp8", "bf16")
# Of these shapes torch's way is compiled form by form; of the others the layer alone: each takes seconds.
_WHOLE = ("14B", "tiny")
_SETS = 4
_REPLAYS = 15


def poison(device: torch.device, size: int) -> None:
    """Leave NaN in the memory that the next outputs get."""
    torch.full((max(1, size // 4),), float("nan"), device=device)


def time_call(call: Callable[[Inputs], Any], sets: list[Inputs]) -> float:
    """Median seconds of one call, over all sets of inputs; on CUDA in a graph, so that launches do not count."""
    for given in sets:
        call(given)
    if sets[0].hidden.device.type != "cuda":
        began = time.perf_counter()
        call(sets[0])
        return time.perf_counter() - began
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for given in sets:
            call(given)
    graph.replay()
    seconds = []
    for _ in range(_REPLAYS):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        seconds.append(begin.elapsed_time(end) / 1000.0 / len(sets))
    return statistics.median(seconds)


def copy_rate(device: torch.device) -> float:
    """Bytes read plus bytes written, per second."""
    size = 2**31 if device.type == "cuda" else 2**24
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    given = Inputs(*[source] * len(Inputs._fields))
    return 2.0 * size / time_call(lambda _: target.copy_(source), [given])


def bytes_moved(form: str, shape: Shape, quantizes: bool) -> int:
    """Rows read and written once: 2 bytes a value, 1 where they are quantized; vectors and scales are small."""
    values = shape[0] * shape[1] * shape[2]
    written = 1 if quantizes else 2
    norm1, other, last = 2 + written, 6 + written, 6
    return values * {"norm1": norm1, "norm2": other, "norm3": other, "layer": norm1 + 2 * other + last}[form]


def measure(
    name: str, weight_format: str, device: torch.device, rate: float, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each form, or the reason why there is none."""
    shape, quantizes = SHAPES[name], weight_format == "fp8"
    sets = [draw(shape, device, seed) for seed in range(_SETS)]
    variant = LayerNormVariant(shape[2], True, True, False, quantizes)
    kernel = LAYER_NORM.load(device, torch.bfloat16, variant)
    settings: dict[str, Any] = {"dynamic": False, "backend": options.backend}
    if options.backend == "inductor" and hasattr(torch._inductor.config, "deterministic"):
        settings["options"] = {"deterministic": True}
    for form in FORMS if name in _WHOLE else ("layer",):
        row: dict[str, Any] = {"shape": name, "format": weight_format, "form": form}
        if kernel is None and device.type == "cuda":
            yield {**row, "failed": str(LAYER_NORM.why_not(device, torch.bfloat16, variant))}
            continue
        torch._dynamo.reset()
        moved = bytes_moved(form, shape, quantizes)
        row["floor_us"] = 1e6 * moved / rate
        plain = new_way(form, quantizes, kernel)
        ways = {"old": torch.compile(old_way(form, quantizes), **settings), "new": plain}
        if form == "layer":
            ways["new_compiled"] = torch.compile(plain, **settings)
        for way, call in ways.items():
            poison(device, moved)
            row[f"{way}_error"], row[f"{way}_difference"] = largest_error(form, sets[0], call(sets[0]), quantizes)
            row[f"{way}_us"] = 1e6 * time_call(call, sets)
        if quantizes and form == "norm1":
            row["other_bytes"] = quantized_otherwise(sets[0], kernel)
        for warps in options.warps if kernel is not None and form == "norm2" else ():
            with mock.patch.object(layer_norm_launch, "_count_warps", lambda rest, warps=warps: warps):
                row[f"{warps}_warps_us"] = 1e6 * time_call(plain, sets)
        yield row


def quantized_otherwise(given: Inputs, kernel: Any) -> float:  # noqa: ANN401
    """The share of bytes that are not those of torch's quantization of the same normed values, in float32."""
    modulation = given.table + given.temb.float()
    scaling = RowScaling(modulation[:, 1], modulation[:, 0], True, EPSILON)
    hidden = given.hidden.float()
    _, normed = add_and_norm(hidden, scaling, None, quantize=False, kernel=kernel)
    _, rows = add_and_norm(hidden, scaling, None, quantize=True, kernel=kernel)
    assert isinstance(normed, torch.Tensor) and isinstance(rows, QuantizedRows)
    # On a card torch multiplies by 1 / 448, which may be the next number.
    torch.testing.assert_close(rows.scale, quantize(normed)[1], rtol=3e-7, atol=0.0)
    quantized = torch.empty_like(rows.quantized)
    torch.div(normed, rows.scale.view(*normed.shape[:-1], 1), out=quantized)
    return float((quantized.view(torch.uint8) != rows.quantized.view(torch.uint8)).double().mean())


def print_row(row: dict[str, Any]) -> None:
    """One line of the table, and one for what only this row has."""
    start = f"{row['shape']:<12}{row['format']:<6}{row['form']:<7}"
    if "failed" in row:
        print(f"{start}{row['failed']}", flush=True)
        return
    compiled = f"{row['new_compiled_us']:>14.1f}" if "new_compiled_us" in row else " " * 14
    best = min(row["new_us"], row.get("new_compiled_us", row["new_us"]))
    errors = "".join(f"{row[name]:>12.3g}" for name in ("old_error", "new_error", "old_difference", "new_difference"))
    print(
        f"{start}{row['old_us']:>9.1f}{row['new_us']:>9.1f}{compiled}{row['floor_us']:>9.1f}"
        f"{best / row['floor_us']:>8.2f}{errors}"
    )
    for key, value in row.items():
        if key.endswith("_warps_us") or key == "other_bytes":
            print(f"    {key} {value:.4g}")


def main(arguments: list[str] | None = None) -> None:
    """Run the program."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [name for name in SHAPES if name != "tiny"]
    split = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--shapes", type=split, default=names, help=", ".join(SHAPES))
    parser.add_argument("--formats", type=split, default=list(FORMATS), help=", ".join(FORMATS))
    parser.add_argument("--warps", type=lambda text: [int(one) for one in split(text)], default=[2, 4, 8])
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="file for the rows")
    parser.add_argument("--time-budget", type=float, default=200.0, help="seconds; then nothing new starts")
    options = parser.parse_args(arguments)
    for given, allowed in ((options.shapes, tuple(SHAPES)), (options.formats, FORMATS)):
        wrong = [one for one in given if one not in allowed]
        if wrong:
            parser.error(f"{wrong[0]!r} is unknown: choose from {', '.join(allowed)}.")
    device, deadline = torch.device(options.device), time.monotonic() + options.time_budget
    rate = copy_rate(device)
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else device
    print(f"{card}, torch {torch.__version__}, copies {rate / 1e12:.3f} TB/s; us a call, errors beside float64")
    print(
        f"{'shape':<12}{'':<6}{'':<7}{'old':>9}{'new':>9}{'new, compiled':>14}{'floor':>9}{'x floor':>8}"
        f"{'old error':>12}{'new error':>12}{'old max':>12}{'new max':>12}",
        flush=True,
    )
    rows: list[dict[str, Any]] = [{"card": str(card), "torch": torch.__version__, "copy_rate": rate}]
    with torch.no_grad():
        for name in options.shapes:
            for weight_format in options.formats:
                if time.monotonic() > deadline:
                    print(f"{name} {weight_format}: out of time")
                    continue
                for row in measure(name, weight_format, device, rate, options):
                    print_row(row)
                    rows.append(row)
    if options.json is not None:
        options.json.write_text(json_text(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
