"""What the device can do: matrix rates, attention rates and copy rate, measured on random data."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

from streamblocks.ops.attention_backends import LIBRARY_BACKENDS
from streamblocks.ops.library_attention import attend, explain, load

Rates = dict[str, float]


@dataclass
class DeviceRates:
    """Measured rates, per second.

    Attributes:
        matrix: operations by format ("bf16", "fp8", "int8") of a large square product.
        linear: operations by "format MxKxN", at shapes of the model.
        attention: operations by "backend queries x keys", at shapes of the model.
        copy: bytes read plus bytes written.
        failures: what could not be measured, and why.
    """

    matrix: Rates = field(default_factory=dict)
    linear: Rates = field(default_factory=dict)
    attention: Rates = field(default_factory=dict)
    copy: float = 0.0
    failures: dict[str, str] = field(default_factory=dict)

    def matrix_rate(self, name: str) -> float:
        """Of the format, or of bf16 where that format could not be measured."""
        return self.matrix.get(name, self.matrix["bf16"])

    def best_attention(self) -> float:
        """The fastest backend's rate; the bf16 matrix rate if no backend ran."""
        return max(self.attention.values(), default=self.matrix["bf16"])

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class AttentionShape:
    """One self-attention call of a steady denoising pass."""

    queries: int
    keys: int
    heads: int
    head_dim: int


def measure_rates(
    device: torch.device,
    *,
    attention: AttentionShape,
    backends: list[str],
    linears: list[tuple[int, int, int]],
) -> DeviceRates:
    """Measure everything once; what fails is noted in `failures`. Small sizes are used on a CPU."""
    rates = DeviceRates()
    on_cuda = device.type == "cuda"
    square = 8192 if on_cuda else 256
    for name, product in _PRODUCTS.items():
        large = partial(_product_rate, product, device, (square, square, square))
        _note(rates, f"matrix {name}", rates.matrix, name, large)
        for shape in linears if name in rates.matrix else []:
            label = f"{name} {'x'.join(map(str, shape))}"
            _note(rates, label, rates.linear, label, partial(_product_rate, product, device, shape))
    for backend in backends:
        label = f"{backend} {attention.queries}x{attention.keys}"
        _note(rates, label, rates.attention, label, partial(_attention_rate, backend, device, attention))
    rates.copy = _copy_rate(device, 2**32 if on_cuda else 2**24)
    return rates


def time_call(call: Callable[[], Any], device: torch.device, repeats: int = 15) -> float:
    """Median seconds of `call`, after three warm-up calls."""
    for _ in range(3):
        call()
    if device.type != "cuda":
        return statistics.median(_host_seconds(call) for _ in range(repeats))
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    marks[0].record()
    for mark in marks[1:]:
        call()
        mark.record()
    torch.cuda.synchronize(device)
    return statistics.median(a.elapsed_time(b) for a, b in itertools.pairwise(marks)) / 1000.0


def _host_seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return max(time.perf_counter() - began, 1e-9)


def _note(rates: DeviceRates, label: str, into: Rates, key: str, measure: Callable[[], float]) -> None:
    try:
        into[key] = measure()
    except (RuntimeError, ValueError, NotImplementedError, ImportError, TypeError) as error:
        rates.failures[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"


Product = Callable[[torch.device, tuple[int, int, int]], Callable[[], torch.Tensor]]


def _bf16_product(device: torch.device, shape: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device, dtype=torch.bfloat16)
    right = torch.randn(columns, inner, device=device, dtype=torch.bfloat16)
    return lambda: torch.nn.functional.linear(left, right)


def _fp8_product(device: torch.device, shape: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(torch.float8_e4m3fn)
    right = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn)
    one = torch.ones((), device=device)
    return lambda: torch._scaled_mm(
        left, right.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _fp8_rowwise_product(device: torch.device, shape: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    rows, inner, columns = shape
    left = torch.randn(rows, inner, device=device).to(torch.float8_e4m3fn)
    right = torch.randn(columns, inner, device=device).to(torch.float8_e4m3fn)
    per_row, per_column = torch.rand(rows, 1, device=device), torch.rand(1, columns, device=device)
    return lambda: torch._scaled_mm(
        left, right.t(), scale_a=per_row, scale_b=per_column, out_dtype=torch.bfloat16, use_fast_accum=True
    )


def _int8_product(device: torch.device, shape: tuple[int, int, int]) -> Callable[[], torch.Tensor]:
    rows, inner, columns = shape
    left = torch.randint(-127, 128, (rows, inner), device=device, dtype=torch.int8)
    right = torch.randint(-127, 128, (columns, inner), device=device, dtype=torch.int8)
    return lambda: torch._int_mm(left, right.t())


_PRODUCTS: Mapping[str, Product] = {
    "bf16": _bf16_product,
    "fp8": _fp8_product,
    "fp8 rowwise": _fp8_rowwise_product,
    "int8": _int8_product,
}


def _product_rate(product: Product, device: torch.device, shape: tuple[int, int, int]) -> float:
    rows, inner, columns = shape
    return 2.0 * rows * inner * columns / time_call(product(device, shape), device)


def _attention_rate(backend: str, device: torch.device, shape: AttentionShape) -> float:
    def random_tokens(tokens: int) -> torch.Tensor:
        return torch.randn(1, tokens, shape.heads, shape.head_dim, device=device, dtype=torch.bfloat16)

    query, key, value = random_tokens(shape.queries), random_tokens(shape.keys), random_tokens(shape.keys)
    with torch.no_grad():
        call = _library_call(backend, query) if backend in LIBRARY_BACKENDS else _dispatched_call(backend)
        seconds = time_call(lambda: call(query, key, value), device)
    return 4.0 * shape.queries * shape.keys * shape.heads * shape.head_dim / seconds


def _dispatched_call(backend: str) -> Callable[..., torch.Tensor]:
    name = AttentionBackendName(backend)
    return lambda query, key, value: dispatch_attention_fn(query, key, value, backend=name)


def _library_call(backend: str, like: torch.Tensor) -> Callable[..., torch.Tensor]:
    """Compiled, because what 8 bits need beforehand is slow in eager code."""
    kind = like.device, like.dtype, like.shape[-1]
    loaded = load(backend, *kind)
    if loaded is None:
        raise ValueError(explain(backend, *kind))
    return torch.compile(partial(attend, loaded), dynamic=False)


def _copy_rate(device: torch.device, size: int) -> float:
    source = torch.randint(0, 255, (size,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)
    return 2.0 * size / time_call(lambda: target.copy_(source), device)
