"""Settings of torch.compile that hold while compiled layers run.

Newer versions of torch (2.13, 2.14) keep settings for one context, and ComfyUI runs each prompt in a context of its
own: what is set where a model is loaded is gone where a later prompt streams it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_VARIANTS = 64


@contextmanager
def share_graphs(any_number: str) -> Iterator[None]:
    """Inside, layers are compiled once for all values of one of their numbers, and in up to 64 variants otherwise.

    Dynamo's own limit is 8 variants; behind it layers run uncompiled. Each size that a user tries adds one.

    Args:
        any_number: where dynamo finds the number, as a regular expression for `re.match`, without commas. Versions of
            torch that know no such setting compile for each value.
    """
    dynamo = torch._dynamo.config
    compiler: Any = getattr(torch.compiler, "config", None)
    with dynamo.patch(recompile_limit=max(dynamo.recompile_limit, _VARIANTS)):
        if not hasattr(compiler, "dynamic_sources"):
            yield
            return
        sources = ",".join(filter(None, (compiler.dynamic_sources, any_number)))
        with compiler.patch(dynamic_sources=sources):
            yield
