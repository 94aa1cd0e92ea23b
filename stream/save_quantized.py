"""Save the quantized transformer of a pipeline."""

from __future__ import annotations

import errno
from pathlib import Path

from ..wan.checkpoints.quantized_checkpoint import save_quantized_transformer
from .pipelines import BuiltInPipeline, StreamPipeline


def save_quantized_pipeline(pipeline: StreamPipeline, path: Path) -> Path:
    """Load the pipeline's transformer, if it is not loaded yet, and write it in ComfyUI's quantized format.

    Args:
        pipeline: materialised from a recipe with quantization.
        path: a `.safetensors` file; replaced only by a complete one.

    Raises:
        ValueError: the pipeline has foreign blocks, or its format cannot be written.
        OSError: the disk is full; nothing is left behind.
    """
    if not isinstance(pipeline, BuiltInPipeline):
        raise ValueError("pipeline has the repository's own blocks: only built-in ones are quantized and saved.")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        return save_quantized_transformer(pipeline.transformer(), path)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise OSError(
            errno.ENOSPC, f"the disk of {path.parent} is full: nothing was written; free some space and run again"
        ) from error
