"""A layer's norms, residuals and quantization of rows: as formulas for torch.compile, by the kernel, and in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import streamblocks_path  # noqa: F401
import torch
from torch.nn import functional as F

from streamblocks.ops.fp8_linear import QuantizedRows, fp8_scale, largest_magnitude
from streamblocks.ops.kernels.layer_norm_launch import Residual, RowScaling
from streamblocks.ops.normed_rows import add_and_norm

# Groups, rows of each, columns.
Shape = tuple[int, int, int]
FORMS = ("norm1", "norm2", "norm3", "layer")
EPSILON = 1e-6


class Inputs(NamedTuple):
    """A layer's input, what its three parts add to it in turn, its modulation, and the weights of its norm2."""

    hidden: torch.Tensor
    first: torch.Tensor
    second: torch.Tensor
    third: torch.Tensor
    table: torch.Tensor
    temb: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor


def draw(shape: Shape, device: torch.device, seed: int) -> Inputs:
    """Random inputs, with a mean that is not 0; bfloat16 but for what the model keeps in float32."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, device=device, generator=generator)

    groups, _, columns = shape
    rows = [(normal(*shape) + 0.3).bfloat16() for _ in range(4)]
    modulation = 0.3 * normal(1, 6, columns), (0.3 * normal(groups, 6, columns)).bfloat16()
    return Inputs(rows[0], rows[1], rows[2], rows[3], *modulation, 1.0 + 0.1 * normal(columns), 0.05 * normal(columns))


def quantize(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """As `FP8Linear` quantizes its input."""
    flat = rows.reshape(-1, rows.shape[-1])
    scale = fp8_scale(largest_magnitude(flat, "per row"))
    quantized = torch.empty(flat.shape, dtype=torch.float8_e4m3fn, device=rows.device)
    torch.div(flat, scale, out=quantized)
    return quantized.view(rows.shape), scale


def old_way(form: str, quantizes: bool) -> Callable[..., tuple[torch.Tensor, ...]]:
    """The formulas one after another, for torch.compile."""

    def compute(given: Inputs) -> tuple[torch.Tensor, ...]:
        shift, scale, gate, last_shift, last_scale, last_gate = (given.table + given.temb.float()).chunk(6, dim=1)
        hidden, columns = given.hidden, (given.hidden.shape[-1],)
        made: list[torch.Tensor] = []

        def keep(normed: torch.Tensor) -> None:
            rounded = normed.to(hidden.dtype)
            made.extend(quantize(rounded) if quantizes else (rounded,))

        if form in ("norm1", "layer"):
            keep(F.layer_norm(hidden.float(), columns, eps=EPSILON) * (1 + scale) + shift)
        if form in ("norm2", "layer"):
            hidden = (hidden.float() + given.first * gate).to(hidden.dtype)
            keep(F.layer_norm(hidden.float(), columns, given.weight, given.bias, EPSILON))
        if form in ("norm3", "layer"):
            hidden = hidden + given.second
            keep(F.layer_norm(hidden.float(), columns, eps=EPSILON) * (1 + last_scale) + last_shift)
        if form == "layer":
            hidden = (hidden.float() + given.third * last_gate).to(hidden.dtype)
        return (*made, hidden)

    return compute


def new_way(form: str, quantizes: bool, kernel: Any) -> Callable[..., tuple[torch.Tensor, ...]]:  # noqa: ANN401
    """By `add_and_norm`; without a kernel, with torch."""

    def compute(given: Inputs) -> tuple[torch.Tensor, ...]:
        modulation = given.table + given.temb.float()
        hidden = given.hidden
        made: list[torch.Tensor] = []

        def norm(scaling: RowScaling, residual: Residual | None) -> torch.Tensor:
            summed, rows = add_and_norm(hidden, scaling, residual, quantize=quantizes, kernel=kernel)
            made.extend(rows[:2] if isinstance(rows, QuantizedRows) else (rows,))
            return summed

        if form in ("norm1", "layer"):
            norm(RowScaling(modulation[:, 1], modulation[:, 0], True, EPSILON), None)
        if form in ("norm2", "layer"):
            weights = RowScaling(given.weight.unsqueeze(0), given.bias.unsqueeze(0), False, EPSILON)
            hidden = norm(weights, Residual(given.first, modulation[:, 2]))
        if form in ("norm3", "layer"):
            scaling = RowScaling(modulation[:, 4], modulation[:, 3], True, EPSILON)
            hidden = norm(scaling, Residual(given.second, None))
        if form == "layer":
            hidden = (hidden.float() + given.third * modulation[:, 5:]).to(hidden.dtype)
        return (*made, hidden)

    return compute


def exact(form: str, given: Inputs) -> list[torch.Tensor]:
    """In float64, nothing rounded: the normed rows of each norm, then the sum."""
    wide = Inputs(*(part.double() for part in given))
    table = wide.table + wide.temb
    hidden = wide.hidden
    made: list[torch.Tensor] = []

    def norm(gain: torch.Tensor, shift: torch.Tensor) -> None:
        centred = hidden - hidden.mean(-1, keepdim=True)
        made.append(centred / (centred.square().mean(-1, keepdim=True) + EPSILON).sqrt() * gain + shift)

    if form in ("norm1", "layer"):
        norm(1 + table[:, 1:2], table[:, :1])
    if form in ("norm2", "layer"):
        hidden = hidden + wide.first * table[:, 2:3]
        norm(wide.weight, wide.bias)
    if form in ("norm3", "layer"):
        hidden = hidden + wide.second
        norm(1 + table[:, 4:5], table[:, 3:4])
    if form == "layer":
        hidden = hidden + wide.third * table[:, 5:]
    return [*made, hidden]


def values_of(made: tuple[torch.Tensor, ...], quantizes: bool) -> list[torch.Tensor]:
    """What was made, in float64, rows times their scales."""
    if not quantizes:
        return [part.double() for part in made]
    rows = [
        quantized.double() * scale.double().view(*quantized.shape[:-1], 1)
        for quantized, scale in zip(made[:-1:2], made[1:-1:2], strict=True)
    ]
    return [*rows, made[-1].double()]


def largest_error(form: str, given: Inputs, made: tuple[torch.Tensor, ...], quantizes: bool) -> tuple[float, float]:
    """Over all that was made, the worst |made - exact| / |exact|, and the largest difference; NaN is infinite."""
    errors, differences = [], []
    for part, right in zip(values_of(made, quantizes), exact(form, given), strict=True):
        errors.append(float((part - right).norm() / right.norm()))
        differences.append(float((part - right).abs().max()))
    finite = all(error == error for error in errors)
    return (max(errors), max(differences)) if finite else (float("inf"), float("inf"))
