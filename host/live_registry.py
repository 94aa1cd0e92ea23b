"""The streams that pages may watch and steer, by prompt and node."""

from __future__ import annotations

import secrets
from collections import Counter
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

from ..stream.live_control import LiveControl
from ..stream.live_news import LiveNews
from .frame_turns import FrameTurns
from .tokens import is_same

MOST_ENDED = 8


class FrameInbox(Protocol):
    """Takes pictures that pages give."""

    def put(self, jpeg: bytes) -> None:
        """Take one JPEG; called outside of the server's loop. Raises ValueError with a sentence for a bad one."""


@dataclass
class LiveStream:
    """One stream of a node.

    Attributes:
        prompt_id: of ComfyUI's queue.
        node: the node's execution id, such as "12:5".
        workflow: the id of the workflow on the page; None outside of one.
        news: what pages are told.
        control: None once the stream has ended.
        inbox: None where the stream takes no frames, or has ended.
        frames_from: the execution id of the node whose page gives the frames; None where any page's may.
        turns: whose frame is decoded; only the server's loop uses them.
        token: who has it may steer.
        waiting: requests that wait for news; only the server's loop counts them.
    """

    prompt_id: str
    node: str
    workflow: str | None
    news: LiveNews
    control: LiveControl | None
    inbox: FrameInbox | None = None
    frames_from: str | None = None
    turns: FrameTurns = field(default_factory=FrameTurns, repr=False)
    token: str = field(default_factory=lambda: secrets.token_urlsafe(32), repr=False)
    waiting: int = 0

    def admits(self, token: str) -> bool:
        """Whether `token` is this stream's, in a time that says nothing about it."""
        return is_same(token, self.token)


class LiveStreams:
    """Running streams, and the newest `MOST_ENDED` that have ended. Thread-safe."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._streams: dict[tuple[str, str], LiveStream] = {}
        self._changed_by_hand: Counter[str] = Counter()

    def begin(self, stream: LiveStream) -> None:
        """List a stream; one of the same prompt and node is forgotten."""
        stream.news.follow(stream.control)
        if stream.inbox is not None:
            stream.news.update(takes_frames=True)
        with self._lock:
            self._streams[stream.prompt_id, stream.node] = stream

    def end(self, stream: LiveStream, state: str) -> None:
        """Let nobody steer the stream any more; `state` is told if the stream has not said how it ended."""
        stream.control = stream.inbox = None
        stream.news.end(state)
        with self._lock:
            key = (stream.prompt_id, stream.node)
            if self._streams.get(key) is stream:
                # Behind those that ended earlier.
                self._streams[key] = self._streams.pop(key)
            ended = [each for each, other in self._streams.items() if other.control is None]
            for old in ended[:-MOST_ENDED]:
                del self._streams[old]

    def note_changed_by_hand(self, node: str) -> None:
        """Note that a stream of `node` was not what its inputs say."""
        with self._lock:
            self._changed_by_hand[node] += 1

    def times_changed_by_hand(self, node: str) -> int:
        """How many streams of `node` were not."""
        with self._lock:
            return self._changed_by_hand[node]

    def find(self, prompt_id: str, node: str) -> LiveStream | None:
        """The stream of a node in a prompt; None where there is none."""
        with self._lock:
            return self._streams.get((prompt_id, node))

    def listed(self) -> list[LiveStream]:
        """All of them, those that ended first in the order in which they did."""
        with self._lock:
            return list(self._streams.values())
