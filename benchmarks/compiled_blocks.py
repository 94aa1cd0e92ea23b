"""torch.compile on the parts of a pipeline, in place, and back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import streamblocks_path  # noqa: F401
import torch
from random_pipeline import RandomPipeline
from torch import nn

# Each variant a block is compiled for (its layer, past length) counts; the default of 8 would go back to eager.
_RECOMPILE_LIMIT = 512


@contextmanager
def compiled(
    pipeline: RandomPipeline, *, transformer: bool, vae: bool, backend: str, mode: str | None, fullgraph: bool
) -> Iterator[None]:
    """Compile each transformer block and the VAE decoder, as asked, for the length of the `with` block."""
    modules: list[nn.Module] = [*pipeline.pipe.transformer.blocks] if transformer else []
    modules += [pipeline.pipe.vae.decoder] if vae else []
    if not modules:
        yield
        return
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with torch._dynamo.config.patch(
        recompile_limit=_RECOMPILE_LIMIT, accumulated_recompile_limit=16 * _RECOMPILE_LIMIT
    ):
        for module in modules:
            module.compile(backend=backend, mode=mode, fullgraph=fullgraph, dynamic=False)
        try:
            yield
        finally:
            for module in modules:
                module._compiled_call_impl = None
            torch._dynamo.reset()
