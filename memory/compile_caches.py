"""The caches of torch.compile: counted, and cleared the official way; see docs/memory.md for the versions."""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class CompileCaches:
    """How much torch.compile remembers in this process.

    Their bytes are not counted: generated code is host memory, and a graph's constants are the module's weights.

    Attributes:
        code_objects: Python functions that dynamo has looked at.
        dynamo_entries: compiled variants of these, each with its guards and its graph.
        inductor_modules: Python modules that inductor has generated and loaded.
    """

    code_objects: int = 0
    dynamo_entries: int = 0
    inductor_modules: int = 0


def count_compile_caches() -> CompileCaches:
    """Count the entries without importing anything: a module that is not imported has none."""
    frames = sys.modules.get("torch._dynamo.convert_frame")
    code_cache = sys.modules.get("torch._inductor.codecache")
    code_objects = entries = 0
    if frames is not None:
        from torch._dynamo.eval_frame import _debug_get_cache_entry_list

        codes = [code for reference in frames.input_codes.seen if (code := reference()) is not None]
        code_objects = len(codes)
        entries = sum(len(_debug_get_cache_entry_list(code)) for code in codes)
    inductor = 0 if code_cache is None else len(code_cache.PyCodeCache.modules)
    return CompileCaches(code_objects, entries, inductor)


def clear_compile_caches() -> CompileCaches:
    """Clear everything torch.compile made in this process. What is used next is compiled again, helped by
    inductor's cache on disk, which stays.

    Returns:
        The counts before.
    """
    before = count_compile_caches()
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
    if "torch._inductor.utils" in sys.modules:
        from torch._inductor.utils import clear_inductor_caches

        # torch.compiler.reset leaves the generated modules and inductor's lookup tables.
        clear_inductor_caches()
    return before
