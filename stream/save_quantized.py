"""Save the quantized transformer of a pipeline."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torch import nn

from ..families.model_family import ModelFamily
from ..memory.byte_text import format_gb
from ..memory.error_locals import clearing_error_locals
from ..memory.tensor_bytes import module_bytes
from .component_store import ignore_load
from .estimate import DEVICE_OVERHEAD
from .full_disk import explaining_full_disk
from .pipelines import BuiltInPipeline
from .stream_pipeline import StreamPipeline


class SaveWatcher(Protocol):
    """Observes the loading and writing of a model; raising stops either."""

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Called after each tensor: `done` of `total` bytes of a component are loaded."""

    def while_writing(self, done: int, total: int) -> None:
        """Called after each tensor: `done` of `total` bytes are in the file."""


@clearing_error_locals
def save_quantized_pipeline(pipeline: StreamPipeline, path: Path, watcher: SaveWatcher) -> Path:
    """Load the pipeline's transformer, if it is not loaded yet, and write it in ComfyUI's quantized format.

    On any error no partial file is left and a partly loaded transformer is freed; the error holds no reference to
    it.

    Args:
        pipeline: materialised from a recipe with quantization.
        path: a `.safetensors` file; replaced only by a complete one.
        watcher: observes progress; raising in it (cancel) stops the loading or writing within one tensor.

    Raises:
        ValueError: the pipeline has foreign blocks, or its format cannot be written.
        MemoryError: the transformer cannot fit the device; nothing was loaded.
        OSError: the disk is full; nothing is left behind.
    """
    if not isinstance(pipeline, BuiltInPipeline):
        raise ValueError("pipeline has the repository's own blocks: only built-in ones are quantized and saved.")
    _check_fit(pipeline)
    pipeline.on_load = watcher.while_loading
    try:
        transformer = pipeline.transformer()
    finally:
        pipeline.on_load = ignore_load
    path.parent.mkdir(parents=True, exist_ok=True)
    with explaining_full_disk(path.parent, lambda: "nothing was written"):
        return _write(pipeline.family, transformer, path, watcher)


def _check_fit(pipeline: BuiltInPipeline) -> None:
    weights = pipeline.transformer_bytes()
    available = pipeline.residency.available_bytes(pipeline.device)
    overhead = 0 if pipeline.device.type == "cpu" else DEVICE_OVERHEAD
    needed = weights + overhead
    if weights and available is not None and not pipeline.fit_transformer(available - overhead):
        raise MemoryError(
            f"the quantized transformer needs {format_gb(needed)} of {pipeline.device}, "
            f"{format_gb(available)} are free: close programs that use the memory, or set the loader's device to 'cpu' "
            "and save from there."
        )


def _write(family: ModelFamily, transformer: nn.Module, path: Path, watcher: SaveWatcher) -> Path:
    # Approximate: the file also has a few bytes of metadata per layer, and a scale for each projection fused here.
    total = module_bytes(transformer)
    written = 0

    def on_tensor(_: str, nbytes: int) -> None:
        nonlocal written
        written += nbytes
        watcher.while_writing(min(written, total), total)

    family.save_quantized(transformer, path, on_tensor)
    return path
