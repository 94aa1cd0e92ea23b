"""Requests that wait until there is news of a stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

from aiohttp import web

from ..stream.live_news import LiveNews

SECONDS_TO_WAIT = 20.0
# How soon a page that has gone is noticed.
_SECONDS_BETWEEN_LOOKS = 1.0
# What changes together is told together.
_SECONDS_TO_GATHER = 0.03


async def wait_for_news(request: web.Request, news: LiveNews, version: int) -> bool:
    """Wait until there is another version than `version`; False if there is none in time, or the page has gone."""
    loop = asyncio.get_running_loop()
    changed = asyncio.Event()
    listener = _waker(loop, changed)
    news.add_listener(listener)
    try:
        if news.version != version:
            return True
        end = loop.time() + SECONDS_TO_WAIT
        while not await _is_set(changed, min(_SECONDS_BETWEEN_LOOKS, end - loop.time())):
            if loop.time() >= end or request.transport is None:
                return False
        await asyncio.sleep(_SECONDS_TO_GATHER)
        return True
    finally:
        news.remove_listener(listener)


async def _is_set(event: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(event.wait(), max(seconds, 0))
    except (asyncio.TimeoutError, TimeoutError):
        return event.is_set()
    return True


def _waker(loop: asyncio.AbstractEventLoop, changed: asyncio.Event) -> Callable[[], None]:
    """Sets the event from any thread, once."""
    called = False

    def wake() -> None:
        nonlocal called
        if not called:
            called = True
            # The server may end while a stream runs; that is nothing to the stream.
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(changed.set)

    return wake
