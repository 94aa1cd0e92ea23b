"""Streams that a test makes, block by block, behind the routes that the page watches and steers them by.

    with FakeLiveStreams() as fake:
        fake.send_page_to_it(page)
        stream = fake.add("prompt", "2", workflow_id)
        stream.make_block()

Nothing is computed: the page is what is tested.
"""

from __future__ import annotations

import colorsys
import io
import json
import select
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from playwright.sync_api import BrowserContext, Page, Route

LONGEST_WAIT = 20.0
MIB = 2**20


def draw_pictures(block: int, count: int, size: tuple[int, int]) -> list[bytes]:
    """`count` JPEGs of a dot that goes right; the colour tells the block."""
    pictures = []
    for index in range(count):
        red, green, blue = colorsys.hsv_to_rgb((block * 0.17) % 1, 0.7, 0.5)
        picture = Image.new("RGB", size, tuple(round(255 * part) for part in (red, green, blue)))
        x = size[0] * (index + 1) // (count + 1)
        ImageDraw.Draw(picture).ellipse((x - 20, size[1] // 2 - 20, x + 20, size[1] // 2 + 20), fill="white")
        packed = io.BytesIO()
        picture.save(packed, "JPEG", quality=80)
        pictures.append(packed.getvalue())
    return pictures


@dataclass
class FakeStream:
    """One stream: `header` is what pages are told."""

    header: dict[str, Any]
    token: str
    changed: threading.Condition
    size: tuple[int, int] = (320, 180)
    frames: int = 12
    asked: list[dict[str, Any]] = field(default_factory=list)
    sent_pictures: list[int] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    _points: list[dict[str, Any]] = field(default_factory=list)
    _pictures: list[bytes] = field(default_factory=list)

    def update(self, **fields: object) -> None:
        """Tell pages something new."""
        with self.changed:
            self.header |= fields
            self.header["version"] += 1
            self.changed.notify_all()

    def make_block(self, **fields: object) -> None:
        """One more block, its memory and its pictures."""
        block = self.header["blocks_made"]
        owners = [["transformer", 300 * MIB], ["kv cache", 90 * MIB], ["vae", 40 * MIB]]
        point = {"first": block == 0, "block": block, "blocks": self.header["blocks"], "card": None, "event": ""}
        with self.changed:
            self._points.append(
                point | {"stage": "block end", "allocated": 450 * MIB, "peak": 610 * MIB, "owners": owners}
            )
            self._pictures = draw_pictures(block, self.frames, self.size)
            made = self.header["pictures_made"] + self.frames
            self.update(
                state="running", says=None, blocks_made=block + 1, pictures_made=made, seconds=made / 16.0, **fields
            )

    def news(self, version: int, block: int, points: int, pictures: int, is_there: Callable[[], bool]) -> bytes | None:
        """What the page is sent; None where there is nothing newer for a while, or the page has gone.

        Blocks come whole here: a page that has any of a block's `pictures` has them all.
        """
        with self.changed:
            if not self.changed.wait_for(lambda: self.header["version"] > version, LONGEST_WAIT) or not is_there():
                return None
            newest = self.header["blocks_made"] - 1
            assert pictures == (0 if block < 0 else self.frames)
            jpegs = self._pictures if newest != block else []
            header = {**self.header, "memory": self._points[points:], "points": len(self._points)}
            header |= {"points_from": points, "pictures": None}
            if jpegs:
                width, height = self.size
                header["pictures"] = {"block": newest, "first": 0, "end": self.frames, "of": self.frames}
                header["pictures"] |= {"width": width, "height": height, "lengths": [len(jpeg) for jpeg in jpegs]}
                self.sent_pictures.append(newest)
            text = json.dumps(header).encode()
            return struct.pack(">I", len(text)) + text + b"".join(jpegs)

    def end(self, state: str, **fields: object) -> None:
        """No more blocks; an ended stream has no pictures."""
        with self.changed:
            self._pictures = []
            self.update(state=state, rate=None, next=None, pending=None, **fields)

    def control(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """The status and the answer to what a page asks."""
        self.asked.append(body)
        if body.get("token") != self.token:
            return 403, {"error": "The token is not this stream's: open the page's link again."}
        if self.refusal is not None:
            return self.refusal[0], {"error": self.refusal[1]}
        names = ("prompt", "strength", "attention_bias")
        changes: dict[str, Any] = {"pause": {"state": "pausing"}, "resume": {"state": "running"}}.get(
            body["action"], {"state": "stopping"}
        )
        if body["action"] == "edit":
            changes = {"pending": {name: body[name] for name in names if name in body}}
        self.update(**changes)
        return 200, {"version": self.header["version"]}


class FakeLiveStreams:
    """The routes, on a free loopback port; a context manager."""

    def __init__(self) -> None:
        self.streams: list[FakeStream] = []
        self._changed = threading.Condition(threading.RLock())
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05})

    def __enter__(self) -> FakeLiveStreams:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def add(
        self, prompt_id: str, node: str, workflow: str | None, blocks: int | None = 9, **fields: object
    ) -> FakeStream:
        """A stream that loads its model."""
        header = {
            "version": 0, "prompt_id": prompt_id, "node": node, "workflow": workflow, "state": "loading", "says": None,
            "blocks_made": 0, "blocks": blocks, "pictures_made": 0, "seconds": 0.0, "fps": 16.0, "rate": 12.2,
            "prompt": "a calm sea", "strength": None, "attention_bias": 1.0, "next": None, "pending": None,
            "allowed": {"prompt": "", "strength": "No video is connected to the sampler.", "attention_bias": ""},
            "track": "", "interpolation": "linear", "edited": False, "takes_frames": False,
        }  # fmt: skip
        stream = FakeStream(header | fields, f"token of {prompt_id}", self._changed)
        self.streams.append(stream)
        return stream

    def send_page_to_it(self, page: Page | BrowserContext) -> None:
        """Have the page's requests for streams come here, in place of ComfyUI."""
        page.route("**/streamblocks/streams**", self._redirect)
        page.route("**/streamblocks/streams/**", self._redirect)

    def _redirect(self, route: Route) -> None:
        parts = urlsplit(route.request.url)
        route.continue_(url=f"http://127.0.0.1:{self._server.server_port}{parts.path}?{parts.query}")

    def find(self, prompt_id: str, node: str) -> FakeStream | None:
        """The stream of these ids."""
        ids = (prompt_id, node)
        return next((one for one in self.streams if (one.header["prompt_id"], one.header["node"]) == ids), None)

    def listed(self) -> list[dict[str, Any]]:
        """All streams, the oldest first."""
        ended = {"finished", "stopped", "cancelled", "failed"}
        return [
            {name: one.header[name] for name in ("prompt_id", "node", "workflow")}
            | {"running": one.header["state"] not in ended}
            for one in self.streams
        ]


def _handler(fake: FakeLiveStreams) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            *_, last = url.path.split("/")
            if last == "streams":
                self._answer_json(200, {"streams": fake.listed()})
                return
            stream = self._stream(url.path)
            if stream is None:
                self._answer_json(404, {"error": "There is no such stream."})
                return
            asked = {name: int(values[0]) for name, values in parse_qs(url.query).items()}
            news = stream.news(**asked, is_there=self._page_is_there)
            self._answer(204 if news is None else 200, news or b"", "application/octet-stream")

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            stream = self._stream(urlsplit(self.path).path)
            assert stream is not None and self.headers["Content-Type"] == "application/json"
            self._answer_json(*stream.control(json.loads(body)))

        def _page_is_there(self) -> bool:
            """Whether the request was not given up meanwhile."""
            readable, _, _ = select.select([self.connection], [], [], 0)
            return not readable or self.connection.recv(1, socket.MSG_PEEK) != b""

        def _stream(self, path: str) -> FakeStream | None:
            *_, prompt_id, node, _action = path.split("/")
            return fake.find(unquote(prompt_id), unquote(node))

        def _answer_json(self, status: int, body: dict[str, Any]) -> None:
            self._answer(status, json.dumps(body).encode(), "application/json")

        def _answer(self, status: int, body: bytes, kind: str) -> None:
            try:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)
            except ConnectionError:
                # The page gave the request up.
                self.close_connection = True

        def log_message(self, *_: object) -> None:
            pass

    return Handler
