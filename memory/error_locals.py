"""Lets go of what an error holds: the local variables of every function it came through.

Whoever keeps an error (ComfyUI does, until its next one) keeps its traceback, that keeps the frames, and those keep
caches and activations, although the text of a traceback needs none of them. `traceback.clear_frames` alone is not
enough: a frame also keeps its function, and a function its closure, in which torch's module calls have the
activations. So the traceback is made anew from frames that hold nothing.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable, Iterator
from functools import wraps
from types import FrameType, FunctionType, TracebackType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def clearing_error_locals(function: Callable[P, R]) -> Callable[P, R]:
    """A `function` whose errors hold nothing of what it and the functions it called were working on.

    That is so for the error itself, its causes and its contexts. Type, message and the text of the traceback stay; a
    debugger finds no variables. An error that was being handled before the call is left as it is.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        known = sys.exc_info()[1]
        try:
            return function(*args, **kwargs)
        except BaseException as error:
            for link in _chain(error, known):
                _clear(link)
            # Python 3.10 would raise with the old traceback again if it were not named.
            raise error

    return call


def _chain(error: BaseException, known: BaseException | None) -> Iterator[BaseException]:
    """`error` and every error it leads to, each once."""
    seen = {id(known)}
    waiting: list[BaseException | None] = [error]
    while waiting:
        link = waiting.pop()
        if link is None or id(link) in seen:
            continue
        seen.add(id(link))
        yield link
        waiting += [link.__cause__, link.__context__]
        # Those of an ExceptionGroup, which Python has from 3.11 on.
        members = getattr(link, "exceptions", ())
        waiting += members if isinstance(members, tuple) else ()


def _clear(error: BaseException) -> None:
    if isinstance(error, AttributeError):
        # The object that lacks the attribute: a state, a tensor.
        error.obj = None
    old = error.__traceback__
    error.__traceback__ = _without_frames(old)
    # For others who have the old traceback, such as a log that keeps its records. What still runs stays as it is.
    traceback.clear_frames(old)


def _without_frames(old: TracebackType | None) -> TracebackType | None:
    """The same lines of the same functions, in frames that hold nothing."""
    entries = []
    while old is not None:
        entries.append((old.tb_frame, old.tb_lineno))
        old = old.tb_next
    new: TracebackType | None = None
    for frame, line in reversed(entries):
        # -1: the place within the line is not told.
        new = TracebackType(new, _stand_in(frame), -1, line)
    return new


def _stand_in(frame: FrameType) -> FrameType:
    code = frame.f_code
    named = _never_started.__code__.replace(
        co_filename=code.co_filename, co_name=code.co_name, co_firstlineno=code.co_firstlineno
    )
    # A generator, because the frame of one that was never started has no variables and no caller, which a frame holds
    # too.
    stand_in: FrameType = FunctionType(named, frame.f_globals)().gi_frame
    return stand_in


def _never_started() -> Iterator[None]:
    yield
