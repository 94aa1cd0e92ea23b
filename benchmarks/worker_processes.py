"""Work spread over processes of one thread each, as many as a benchmark is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import TypeVar

import torch

JobT = TypeVar("JobT")
OutcomeT = TypeVar("OutcomeT")


def spread_work(work: Callable[[JobT], OutcomeT], jobs: Sequence[JobT], workers: int) -> Iterator[OutcomeT]:
    """Outcomes in the order of `jobs`; jobs for one pipeline that follow one another rarely load another."""
    if workers == 1:
        _use_one_thread()
        yield from map(work, jobs)
        return
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn"), initializer=_use_one_thread) as pool:
        yield from pool.map(work, jobs)


def _use_one_thread() -> None:
    torch.set_num_threads(1)
