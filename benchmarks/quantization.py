"""Linear layers side by side at the 14B's shapes: error, time, bytes and peak of each quantization.

    python benchmarks/quantization.py [--device cuda] [--tokens 4680] [--small] [--json]

Weights and activations are Gaussian in BF16. The error is against the product in float32 of the same BF16 numbers.
The peak is what one forward allocates beyond weights and input. What the device does not support is skipped with the
reason.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from quantize_afterwards import make_fp8_linear, quantize_layer
from torch import nn
from torch.nn import functional as F

from streamblocks.memory.json_text import json_text
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.memory.tensor_bytes import module_bytes
from streamblocks.ops.calibration import calibrating
from streamblocks.ops.fp8_linear import supports_fp8_matmul
from streamblocks.ops.int8 import require_torchao
from streamblocks.ops.quantization import ACTIVATIONS, WEIGHT_GRANULARITIES, QuantizationSpec

# In and out features: attention, fused attention projections, feed-forward up and down.
SHAPES = ((5120, 5120), (5120, 15360), (5120, 13824), (13824, 5120))
SMALL_DIVISOR = 10
GPU_TOKENS, CPU_TOKENS = 4680, 64
GPU_REPEATS, CPU_REPEATS = 20, 3

Build = Callable[[torch.Tensor, torch.Tensor], nn.Module]


class UnavailableError(Exception):
    """Not available on this device or in this environment; the message is the reason."""


def main(arguments: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--tokens", type=int, help=f"rows of the input ({GPU_TOKENS} on a GPU, {CPU_TOKENS} on a CPU)")
    parser.add_argument("--small", action="store_true", help=f"shapes divided by {SMALL_DIVISOR}, for a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of tables")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    tokens = options.tokens or (GPU_TOKENS if device.type == "cuda" else CPU_TOKENS)
    shapes = [(a // SMALL_DIVISOR // 16 * 16, b // SMALL_DIVISOR // 16 * 16) for a, b in SHAPES]
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "tokens": tokens,
        "shapes": [compare(*shape, tokens, device) for shape in (shapes if options.small else SHAPES)],
    }
    print(json_text(result) if options.json else tables(result))
    return 0


def compare(columns: int, rows: int, tokens: int, device: torch.device) -> dict[str, Any]:
    """All variants of a layer with `columns` in and `rows` out features."""
    generator = torch.Generator().manual_seed(0)
    weight, bias, x = (
        torch.randn(*shape, generator=generator).to(device, torch.bfloat16)
        for shape in ((rows, columns), (rows,), (tokens, columns))
    )
    reference = F.linear(x.float(), weight.float(), bias.float())
    measured: list[dict[str, Any]] = []
    skipped: dict[str, str] = {}
    for name, build in variants():
        try:
            measured.append({"name": name, **_measure(build(weight, bias), x, reference)})
        except UnavailableError as reason:
            skipped[name] = str(reason)
        except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
            skipped[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"
    return {"in": columns, "out": rows, "variants": measured, "skipped": skipped}


def variants() -> Iterator[tuple[str, Build]]:
    """What is compared, by name."""
    yield "BF16", _linear
    for weights in WEIGHT_GRANULARITIES:
        for activations in ACTIVATIONS:
            yield f"ours FP8, weights {weights}, {activations}", _our_fp8(QuantizationSpec("fp8", weights, activations))
    precise = QuantizationSpec("fp8", fast_accumulation=False)
    yield "ours FP8, weights per row, dynamic per row, slow accumulation", _our_fp8(precise)
    for weights in WEIGHT_GRANULARITIES:
        for activations in ("none", "dynamic per row"):
            spec = QuantizationSpec("int8", weights, activations)
            yield f"ours INT8, weights {weights}, {activations}", _our_int8(spec)
    yield "ours INT8, weights per row, dynamic per row, compiled", _compiled(_our_int8(QuantizationSpec("int8")))
    for granularity in ("PerRow", "PerTensor"):
        yield f"torchao FP8 W8A8, {granularity}", _torchao("Float8DynamicActivationFloat8WeightConfig", granularity)
    yield "torchao FP8 weight-only, PerRow", _torchao("Float8WeightOnlyConfig", "PerRow")
    yield "torchao INT8 W8A8, PerRow", _torchao("Int8DynamicActivationInt8WeightConfig", "PerRow")
    yield "torchao INT8 weight-only, PerRow", _torchao("Int8WeightOnlyConfig", "PerRow")
    yield "comfy-kitchen FP8, per tensor", _comfy_kitchen
    for rotated in (False, True):
        yield f"comfy-kitchen INT8, per row{', rotated by 256' if rotated else ''}", _kitchen_int8(rotated)


def _linear(weight: torch.Tensor, bias: torch.Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.bias = nn.Parameter(bias, requires_grad=False)
    return linear


def _our_fp8(spec: QuantizationSpec) -> Build:
    def build(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        if spec.activations != "none" and not supports_fp8_matmul(weight.device):
            raise UnavailableError(f"{weight.device.type} has no FP8 units: the weight is dequantized, as with 'none'")
        layer = make_fp8_linear(weight, bias, spec)
        if spec.activations == "static":
            sample = torch.randn(1024, weight.shape[1], device=weight.device, dtype=weight.dtype)
            with calibrating(layer), torch.no_grad():
                layer(sample)
        return layer

    return build


def _our_int8(spec: QuantizationSpec) -> Build:
    return lambda weight, bias: quantize_layer(_linear(weight, bias), spec)


def _compiled(build: Build) -> Build:
    def built(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        if not weight.is_cuda:
            raise UnavailableError("compiled layers are timed on CUDA only")
        layer = build(weight, bias)
        layer.compile(dynamic=False, options={"max_autotune_gemm_backends": "ATEN"})
        return layer

    return built


def _torchao(config: str, granularity: str) -> Build:
    def build(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        try:
            torchao = require_torchao()
        except ValueError as error:
            raise UnavailableError(str(error)) from error
        linear = _linear(weight, bias)
        made = getattr(torchao, config)(granularity=getattr(torchao, granularity)(), set_inductor_config=False)
        torchao.quantize_(linear, made)
        return linear

    return build


class _KitchenLinear(nn.Module):
    """What ComfyUI's FP8 layer does: quantize the input per tensor, multiply through comfy-kitchen."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, quantized_tensor: Any) -> None:  # noqa: ANN401
        super().__init__()
        self.quantized_tensor = quantized_tensor
        self.kitchen_weight: Any = quantized_tensor.from_float(weight, "TensorCoreFP8Layout")
        self.bias = nn.Parameter(bias, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""
        return F.linear(self.quantized_tensor.from_float(x, "TensorCoreFP8Layout"), self.kitchen_weight, self.bias)


def _comfy_kitchen(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
    if not supports_fp8_matmul(weight.device):
        raise UnavailableError(f"{weight.device.type} has no FP8 units")
    try:
        from comfy_kitchen.tensor import QuantizedTensor
    except ImportError as error:
        raise UnavailableError(f"comfy-kitchen cannot be imported ({error})") from error
    return _KitchenLinear(weight, bias, QuantizedTensor)


class _KitchenInt8(nn.Module):
    """ComfyUI's INT8 layer: input quantized per row, with or without a Hadamard rotation, product and scales."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor, kitchen: Any, *, rotated: bool) -> None:  # noqa: ANN401
        super().__init__()
        self._kitchen, self._rotated = kitchen, rotated
        layout = {"is_weight": True, "per_channel": True, "convrot": rotated, "convrot_groupsize": 256}
        quantized = kitchen.tensor.QuantizedTensor.from_float(weight, "TensorWiseINT8Layout", **layout)
        self.weight = nn.Parameter(quantized._qdata, requires_grad=False)
        self.bias = nn.Parameter(bias, requires_grad=False)
        self.register_buffer("scale", quantized._params.scale.float())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[tokens, in] to [tokens, out]."""
        made: torch.Tensor = self._kitchen.int8_linear(
            x, self.weight, self.scale, self.bias, x.dtype, convrot=self._rotated, convrot_groupsize=256
        )
        return made


def _kitchen_int8(rotated: bool) -> Build:
    def build(weight: torch.Tensor, bias: torch.Tensor) -> nn.Module:
        try:
            import comfy_kitchen
            import comfy_kitchen.tensor
        except ImportError as error:
            raise UnavailableError(f"comfy-kitchen cannot be imported ({error})") from error
        if rotated and weight.shape[1] % 256:
            raise UnavailableError(f"{weight.shape[1]} in features are no multiple of 256")
        return _KitchenInt8(weight, bias, comfy_kitchen, rotated=rotated)

    return build


@torch.no_grad()
def _measure(layer: nn.Module, x: torch.Tensor, reference: torch.Tensor) -> dict[str, float]:
    """SQNR, median time, bytes of the layer and the peak of one forward."""
    error = layer(x).float().sub_(reference)
    signal, noise = reference.double().square().sum(), error.double().square().sum()
    del error
    return {
        "sqnr_db": float(10 * torch.log10(signal / noise)),
        "ms": _median_ms(layer, x),
        "bytes": _bytes(layer),
        "peak_bytes": _peak(layer, x),
    }


def _bytes(layer: nn.Module) -> int:
    if not isinstance(layer, _KitchenLinear):
        return module_bytes(layer)
    # comfy-kitchen's tensor is not a parameter.
    weight = layer.kitchen_weight
    return module_bytes(layer) + int(weight._qdata.nbytes + weight._params.scale.nbytes)


def _median_ms(layer: nn.Module, x: torch.Tensor) -> float:
    layer(x)
    times = []
    for _ in range(GPU_REPEATS if x.is_cuda else CPU_REPEATS):
        if x.is_cuda:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            layer(x)
            end.record()
            torch.cuda.synchronize(x.device)
            times.append(start.elapsed_time(end))
        else:
            began = time.perf_counter()
            layer(x)
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def _peak(layer: nn.Module, x: torch.Tensor) -> int:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        layer(x)
        torch.cuda.synchronize(x.device)
        return torch.cuda.max_memory_allocated(x.device) - before
    with PeakMeter() as meter:
        layer(x)
    return meter.peak_bytes


def tables(result: dict[str, Any]) -> str:
    """The result as text: a table for each shape, then what was skipped and why."""
    lines = [f"{result['device']}, torch {result['torch']}, {result['tokens']} tokens"]
    for shape in result["shapes"]:
        lines += ["", f"{shape['in']} -> {shape['out']}"]
        lines.append(f"  {'':62}{'SQNR dB':>8}{'ms':>10}{'MB':>8}{'peak MB':>9}")
        for row in shape["variants"]:
            lines.append(
                f"  {row['name']:62}{row['sqnr_db']:8.2f}{row['ms']:10.3f}{row['bytes'] / 1e6:8.1f}"
                f"{row['peak_bytes'] / 1e6:9.1f}"
            )
        lines += [f"  {name}: skipped, {reason}" for name, reason in shape["skipped"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
