"""Tells of torch.compile at work, which holds a block up for seconds: the first time on a machine the longest."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def telling_of_compilation(begins: Callable[[], None], ends: Callable[[], None]) -> Iterator[None]:
    """Call `begins` and `ends` around each compilation in this thread inside the `with` block; neither may raise.

    Imports dynamo, which takes a second: only for streams that compile.
    """
    from torch._dynamo.callback import callback_handler

    thread = threading.get_ident()

    def only_here(tell: Callable[[], None]) -> Callable[[Any], None]:
        # Others in this process compile too, and torch tells of all of it.
        return lambda arguments: tell() if threading.get_ident() == thread else None

    starts, stops = only_here(begins), only_here(ends)
    callback_handler.register_start_callback(starts)
    callback_handler.register_end_callback(stops)
    try:
        yield
    finally:
        # Clearing torch.compile's caches, which a stream can ask for at its end, removes them too.
        for known, ours in ((callback_handler.start_callbacks, starts), (callback_handler.end_callbacks, stops)):
            if ours in known:
                known.remove(ours)
