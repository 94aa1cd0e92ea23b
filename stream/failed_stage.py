"""Which block of a modular pipeline an error came from."""

from __future__ import annotations

import traceback

from diffusers.modular_pipelines import ModularPipeline, ModularPipelineBlocks

from ..memory.stage_hooks import leaf_blocks


def find_failed_stage(error: BaseException, pipe: ModularPipeline) -> tuple[str, frozenset[str]]:
    """Name of the leaf block that was running, and of its inputs; empty where none was.

    To be called where the error is caught first: `clearing_error_locals` takes what is looked for.
    """
    names = {id(leaf): name for name, leaf in leaf_blocks(pipe._blocks)}
    for frame, _ in traceback.walk_tb(error.__traceback__):
        # Reading a frame's variables copies them, so only those of calls are read.
        if frame.f_code.co_name != "__call__":
            continue
        called = frame.f_locals.get("self")
        if isinstance(called, ModularPipelineBlocks) and id(called) in names:
            return names[id(called)], frozenset(called.input_names)
    return "", frozenset()
