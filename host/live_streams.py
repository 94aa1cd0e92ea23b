"""Tells ComfyUI's pages of a running stream, where there are pages."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from server import PromptServer

from ..stream.live_control import LiveControl
from ..stream.live_news import LiveNews
from .live_registry import FrameInbox, LiveStream, LiveStreams

# Pages that asked before the stream ended still get its last block.
_SECONDS_WITH_PICTURES = 5.0


@contextmanager
def running(
    prompt_id: str | None,
    node: str | None,
    workflow: str | None,
    control: LiveControl,
    news: LiveNews,
    inbox: FrameInbox | None = None,
    frames_from: str | None = None,
) -> Iterator[str]:
    """Pages may watch and steer a stream while this is open; behind it, they are told how it ended.

    The event `streamblocks.stream` hands the token to the page that queued the prompt. Without a server, a prompt or a
    node, nothing is listed, and the stream runs as ever.

    Args:
        prompt_id: of ComfyUI's queue.
        node: the node's execution id.
        workflow: the id of the workflow on the page.
        control: where edits go.
        news: what pages are told; closed with "finished", or "failed" behind an error, where it does not say more.
        inbox: where pictures of pages go; None if the stream takes none.
        frames_from: the execution id of the node that shows them in the page.

    Yields:
        The token.
    """
    stream = LiveStream(prompt_id or "", node or "", workflow, news, control, inbox, frames_from)
    listed = None if prompt_id is None or node is None else _streams()
    streams = listed or LiveStreams()
    streams.begin(stream)
    if listed is not None:
        # Behind the listing: the page asks at once.
        _hand_out(stream)
    state = "failed"
    try:
        yield stream.token
        state = "finished"
    finally:
        streams.end(stream, state)
        _drop_pictures_later(news)


def note_changed_by_hand(node: str) -> None:
    """Note that a stream of `node` was edited or stopped, so that equal inputs are no reason to show it again."""
    streams = _streams()
    if streams is not None:
        streams.note_changed_by_hand(node)


def times_changed_by_hand(node: str) -> int:
    """How many streams of `node` were edited or stopped since the server started."""
    streams = _streams()
    return 0 if streams is None else streams.times_changed_by_hand(node)


def _streams() -> LiveStreams | None:
    """The registry of the server; None where there is no server with the pack's routes."""
    app = getattr(PromptServer.instance, "app", None)
    if app is None:
        return None
    # Only a server brings aiohttp.
    from .live_routes import STREAMS

    return app.get(STREAMS)


def _hand_out(stream: LiveStream) -> None:
    server = PromptServer.instance
    if server.client_id is not None:
        # Without the client's id, every open page could steer.
        message = {"prompt_id": stream.prompt_id, "node": stream.node, "workflow": stream.workflow}
        server.send_sync("streamblocks.stream", {**message, "token": stream.token}, server.client_id)


def _drop_pictures_later(news: LiveNews) -> None:
    loop = getattr(PromptServer.instance, "loop", None)
    if loop is None or not loop.is_running():
        news.drop_pictures()
    else:
        loop.call_soon_threadsafe(loop.call_later, _SECONDS_WITH_PICTURES, news.drop_pictures)
