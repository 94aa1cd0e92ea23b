"""Switch GPU kernels of the pack off for a while, to measure what they bring in one run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import streamblocks_path  # noqa: F401

from streamblocks.ops.kernels.kernel import ALL, SWITCH_VARIABLE, KernelName

NOTHING = "none"
SWITCHES = (NOTHING, ALL, *(name.value for name in KernelName))


@contextmanager
def without_kernels(name: str) -> Iterator[None]:
    """Switch off the kernel `name` of `SWITCHES`, beside what the environment does; "none" switches nothing."""
    before = os.environ.get(SWITCH_VARIABLE)
    if name != NOTHING:
        os.environ[SWITCH_VARIABLE] = ",".join(filter(None, (before, name)))
    try:
        yield
    finally:
        os.environ.pop(SWITCH_VARIABLE, None)
        if before is not None:
            os.environ[SWITCH_VARIABLE] = before
