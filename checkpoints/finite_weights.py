"""Which stored tensor made a model's results NaN or infinite.

Weights are not checked while they are read: `torch.isfinite` takes half a minute for a 14B's on one core of a CPU, at
every load, for a damage that is rare. They are gone through once a result is not finite.
"""

from __future__ import annotations

import torch
from torch import nn

from ..ops.weight_filling import row_chunks
from .component import Component
from .row_sources import RowSource


def explain_bad_weight(component: Component, module: nn.Module) -> str | None:
    """Which tensor of a file gave `module` a weight that is not finite, and what to do; None when all are finite.

    Args:
        component: `module` was loaded from.
        module: wherever it lies now.

    Raises:
        CheckpointError: the file cannot be read any more.
    """
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        if type(tensor.data) is torch.Tensor and not _is_finite(tensor):
            return _explain(component, name, tensor.dtype)
    return None


def _explain(component: Component, name: str, dtype: torch.dtype) -> str:
    weights = component.weights
    sources = [source for stored, source in weights.sources.items() if weights.joined_name(stored) == name]
    bad = next((source for source in sources if not _is_stored_finite(source)), None)
    if bad is not None:
        return f"{bad.key} in {bad.file} holds NaN or inf; download the file again, or choose another"
    kind = str(dtype).removeprefix("torch.")
    return f"{name} of the {component.name} does not fit into {kind}; choose the dtype bfloat16 or float32"


def _is_stored_finite(source: RowSource) -> bool:
    return all(bool(torch.isfinite(rows.float()).all()) for _, rows in source.chunks(torch.device("cpu")))


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether all numbers are finite; float8, which torch cannot ask, is converted a few rows at a time."""
    if not tensor.is_floating_point():
        return True
    if tensor.element_size() > 1:
        return bool(torch.isfinite(tensor).all())
    columns = tensor[:1].numel()
    return all(bool(torch.isfinite(tensor[rows].float()).all()) for rows in row_chunks(len(tensor), columns))
