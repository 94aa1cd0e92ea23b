"""Streams that pages watch, for the tests of the routes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from live_server import LiveServer

from streamblocks.stream.live_control import LiveControl
from streamblocks.stream.live_news import LiveNews

from live_client import LiveClient


@dataclass
class ListInbox:
    taken: list[bytes] = field(default_factory=list)

    def put(self, jpeg: bytes) -> None:
        self.taken.append(jpeg)


@dataclass
class OpenStream:
    control: LiveControl
    news: LiveNews
    page: LiveClient
    inbox: Any

    def asked(self) -> tuple[Any, ...]:
        """All that can be asked of the stream."""
        control = self.control
        taken = getattr(self.inbox, "taken", [])
        return control.pending.values(), control.is_paused, control.is_stopped, self.news.version, list(taken)


def serve_pages() -> Iterator[LiveServer]:
    """A server, on whose loop nothing may go wrong."""
    with LiveServer() as server:
        yield server
    assert server.failures == []


@contextmanager
def open_stream(
    server: LiveServer, prompt_id: str | None = "prompt", node: str = "12:5", inbox: Any = None
) -> Iterator[OpenStream]:
    """A stream as the sampler opens it, and a page with its token."""
    control, news = LiveControl(), LiveNews()
    with server.module("live_streams").running(prompt_id, node, "flow", control, news, inbox) as token:
        yield OpenStream(control, news, LiveClient(server.port, str(prompt_id), node, token), inbox)


def frames(count: int = 3, height: int = 16, width: int = 24) -> torch.Tensor:
    return torch.zeros(count, height, width, 3, dtype=torch.uint8)


def asking(work: Callable[[], Any]) -> Future[Any]:
    """Something that waits, in a thread."""
    threads = ThreadPoolExecutor(1)
    found = threads.submit(work)
    threads.shutdown(wait=False)
    return found


def wait_until(holds: Callable[[], object]) -> None:
    end = time.monotonic() + 10
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.005)


def waiting(server: LiveServer, prompt_id: str = "prompt", node: str = "12:5") -> int:
    """How many requests wait for news of a stream."""
    streams = server.stub.app[server.module("live_routes").STREAMS]
    return streams.find(prompt_id, node).waiting
