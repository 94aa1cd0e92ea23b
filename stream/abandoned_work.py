"""Work in a thread of its own that can be abandoned: a call to another machine may never return."""

from __future__ import annotations

import ctypes
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

ResultT = TypeVar("ResultT")

# Called some times a second while another machine is waited for; what it raises ends the wait.
Check = Callable[[], None]

# How often who waits looks up, in seconds: a cancel takes no longer.
_LOOK_UP = 0.1


def never_cancelled() -> None:
    """A `Check` of who cannot cancel."""


class Abandoned(BaseException):
    """Ends a thread whose result nobody waits for any more."""


def work_beside(work: Callable[[], ResultT], look_up: Check) -> ResultT:
    """Do `work` in another thread; what it returns or raises.

    If `look_up` raises, the thread is told to end by an exception at its next step in Python, as by Ctrl+C: its files
    and locks are closed. One that hangs in a system call ends when that returns; as a daemon, it holds up no exit.

    Args:
        work: may take any time.
        look_up: called some times a second, in the caller's thread; what it raises is raised here at once.
    """
    results: queue.SimpleQueue[tuple[bool, ResultT | BaseException]] = queue.SimpleQueue()

    def run() -> None:
        try:
            results.put((True, work()))
        except BaseException as error:
            results.put((False, error))

    thread = threading.Thread(target=run, name="streamblocks abandonable", daemon=True)
    thread.start()
    try:
        while True:
            try:
                succeeded, result = results.get(timeout=_LOOK_UP)
                break
            except queue.Empty:
                look_up()
    except BaseException:
        _end(thread)
        raise
    if succeeded:
        return result  # type: ignore[return-value]
    assert isinstance(result, BaseException)
    raise result


def _end(thread: threading.Thread) -> None:
    """Have CPython raise `Abandoned` in a thread (`PyThreadState_SetAsyncExc`); nothing where it has ended."""
    if thread.ident is not None and thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(Abandoned))
