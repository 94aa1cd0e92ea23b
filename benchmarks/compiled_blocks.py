"""torch.compile on the transformer of a pipeline, in place and as the pack does it, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import streamblocks_path  # noqa: F401
import torch
from random_pipeline import RandomPipeline

from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.wan.transformer.compiled_blocks import compile_transformer_blocks


@contextmanager
def compiled(pipeline: RandomPipeline, *, backend: str) -> Iterator[None]:
    """Compile each transformer block for the length of the `with` block."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    blocks = pipeline.pipe.transformer.blocks
    compile_transformer_blocks(pipeline.pipe.transformer, backend)
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None
            # Uncover the class's activation, which the compiled block replaced on the instance.
            vars(block.ffn.net[0]).pop("gelu", None)
            if isinstance(block.ffn.net[-1], FP8Linear):
                block.ffn.net[-1].gelu_kernel = None
        torch._dynamo.reset()
