"""The least time a stage can take on the measured device."""

from __future__ import annotations

from dataclasses import dataclass

import streamblocks_path  # noqa: F401
import torch
from device_rates import AttentionShape, DeviceRates
from full_size_models import ModelSize
from weight_formats import PLAIN, matrix_of
from work_count import Work

from streamblocks.stream.settings import StreamSettings


@dataclass(frozen=True)
class StageFloor:
    """Lower bounds in milliseconds.

    Attributes:
        ideal: all operations at the rate of a large matrix product, or all bytes at the copy rate.
        kernels: linear layers and attention at the best rates measured for the model's own shapes.
    """

    ideal: float
    kernels: float


def stage_floor(work: Work, rates: DeviceRates, size: ModelSize, weight_format: str) -> StageFloor:
    """The floor of `work` with linear layers in `weight_format`."""
    matrix = matrix_of(weight_format)
    weight_bytes = work.linear_bytes if weight_format == PLAIN else work.linear_bytes // 2
    copying = (work.bytes + weight_bytes) / rates.copy
    others = work.convolution / rates.matrix["bf16"]
    ideal = work.linear / rates.matrix_rate(matrix) + work.attention / rates.matrix["bf16"] + others
    kernels = work.linear / linear_rate(rates, matrix, size) + work.attention / rates.best_attention() + others
    return StageFloor(1000 * max(ideal, copying), 1000 * max(kernels, copying))


def attention_shape(size: ModelSize, settings: StreamSettings) -> AttentionShape:
    """Self-attention of one steady pass."""
    per_frame = tokens_per_frame(settings)
    queries = settings.frames_per_block * per_frame
    keys = queries + settings.context_frames * per_frame
    return AttentionShape(
        queries, keys, size.transformer["num_attention_heads"], size.transformer["attention_head_dim"]
    )


def linear_shapes(size: ModelSize, settings: StreamSettings) -> list[tuple[int, int, int]]:
    """Rows, inner size and columns of a block's linear layers: fused projection, square ones, feed-forward."""
    rows = settings.frames_per_block * tokens_per_frame(settings)
    return [(rows, inner, columns) for (inner, columns), _ in _layers(size)]


def linear_rate(rates: DeviceRates, matrix: str, size: ModelSize) -> float:
    """Operations per second of a block's linear layers together, each at the best rate measured for its shape."""
    total = seconds = 0.0
    for (inner, columns), count in _layers(size):
        measured = [
            rate
            for label, rate in rates.linear.items()
            if label.startswith(matrix) and label.endswith(f"x{inner}x{columns}")
        ]
        if not measured:
            return rates.matrix_rate(matrix)
        operations = count * inner * columns
        total, seconds = total + operations, seconds + operations / max(measured)
    return total / seconds


def tokens_per_frame(settings: StreamSettings) -> int:
    """Patches of one latent frame: 8 pixels a latent, 2 latents a patch."""
    return (settings.height // 16) * (settings.width // 16)


def device_of(name: str) -> torch.device:
    """The device with its index; "auto" is CUDA where there is one."""
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    return torch.empty(0, device=kind).device


def _layers(size: ModelSize) -> list[tuple[tuple[int, int], int]]:
    dim = size.transformer["num_attention_heads"] * size.transformer["attention_head_dim"]
    wide = size.transformer["ffn_dim"]
    return [((dim, 3 * dim), 1), ((dim, dim), 3), ((dim, wide), 1), ((wide, dim), 1)]
