"""torch's default dtype, which belongs to the whole process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def default_dtype_kept() -> Iterator[None]:
    """Behind it the default is what it was: diffusers' `from_pretrained` leaves its own where a model is not built."""
    dtype = torch.get_default_dtype()
    try:
        yield
    finally:
        torch.set_default_dtype(dtype)
