"""Sends many wrong requests to the pack's routes, and counts what should not have happened.

    python benchmarks/fuzz_routes.py [--bodies 100000] [--seed 0] [--json]

The server runs in this process. What may be accepted is judged by the `jsonschema` library against the served schema.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import jsonschema
from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError
from kept_connection import KeptConnection
from live_server import LiveServer
from mutated_requests import MutatedRequest, RequestMaker, broken_http

from streamblocks.stream.code_files import CodeFile, RepositoryCode
from streamblocks.stream.live_control import Edit, LiveControl
from streamblocks.stream.live_news import LiveNews

_CONNECTIONS = 16
_SECONDS = 1.0
_CONTROL_BYTES = 64 * 2**10
_CODE = RepositoryCode("owner/name", "0" * 40, (CodeFile("blocks.py", b"a = 1\n"),))


@dataclass
class FuzzFigures:
    """What happened; all but the first two should be 0.

    Attributes:
        bodies: requests sent.
        accepted: requests that changed the stream, rightly.
        wrongly_accepted: accepted, but forbidden by the schema, the size, the place or the headers.
        wrongly_refused: refused, though neither schema nor headers say why.
        crashes: connections that ended without an answer to a whole request, and errors that the server logged.
        hangs_over_1_s: requests without an answer for a second.
        server_errors: answers of 500 and above.
        changed_without_token: changes of a stream for which no request had the token.
        allowed_without_showing: consents that were written, though no request had what only the showing gives.
    """

    bodies: int = 0
    accepted: int = 0
    wrongly_accepted: int = 0
    wrongly_refused: int = 0
    crashes: int = 0
    hangs_over_1_s: int = 0
    server_errors: int = 0
    changed_without_token: int = 0
    allowed_without_showing: int = 0


class CountingControl(LiveControl):
    """Counts what is asked of it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def edit(self, edit: Edit) -> None:
        """See `LiveControl`."""
        self.calls += 1
        super().edit(edit)

    def pause(self) -> None:
        """See `LiveControl`."""
        self.calls += 1

    def resume(self) -> None:
        """See `LiveControl`."""
        self.calls += 1

    def stop(self) -> None:
        """See `LiveControl`."""
        self.calls += 1


class CountingInbox:
    """Counts the pictures it is given."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, jpeg: bytes) -> None:
        """Count a picture."""
        self.calls += 1


class ErrorCounter(logging.Handler):
    """Counts errors that the server logs."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.records: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep the message, unless it says that a request was no HTTP or its body could not be unpacked."""
        kind = None if record.exc_info is None else record.exc_info[0]
        if kind is None or not issubclass(kind, (HttpProcessingError, web.RequestPayloadError)):
            self.records.append(self.format(record))


class RouteFuzz:
    """Sends requests to two streams, of which one has a token that nobody has."""

    def __init__(self, server: LiveServer, token: str, seed: int, question: tuple[str, str, str]) -> None:
        self._server = server
        self._random = random.Random(seed)
        self._token = token
        self._open = RequestMaker(seed + 1, token, "/streamblocks/streams/open/7", question)
        self._locked = RequestMaker(seed + 2, None, "/streamblocks/streams/locked/12:5", question)
        self.figures = FuzzFigures()
        self.statuses: Counter[int] = Counter()
        self.kept: list[str] = []

    async def run(self, bodies: int) -> None:
        """Send `bodies` requests over several connections at once."""
        answer = await KeptConnection(self._server.port).ask(
            b"GET /streamblocks/control-schema HTTP/1.1\r\nHost: x\r\n\r\n"
        )
        self._validator = jsonschema.Draft202012Validator(json.loads(answer[1]))
        self._left = bodies
        await asyncio.gather(*(self._send_all() for _ in range(_CONNECTIONS)))

    async def _send_all(self) -> None:
        connection = KeptConnection(self._server.port)
        while self._left > 0:
            self._left -= 1
            self.figures.bodies += 1
            if self._random.random() < 0.01:
                await self._send_broken()
            else:
                maker = self._locked if self._random.random() < 0.3 else self._open
                await self._send(connection, maker.make(), is_open=maker is self._open)
        connection.close()

    async def _send(self, connection: KeptConnection, request: MutatedRequest, *, is_open: bool) -> None:
        began = time.monotonic()
        try:
            asking = connection.ask(request.written(), has_body=request.method != "HEAD")
            status, _ = await asyncio.wait_for(asking, 5 * _SECONDS)
        except (EOFError, ConnectionError):
            self.figures.crashes += 1
            self._keep("no answer", request)
            connection.close()
            return
        except (asyncio.TimeoutError, TimeoutError):
            self.figures.hangs_over_1_s += 1
            self._keep("no end", request)
            connection.close()
            return
        self.statuses[status] += 1
        if time.monotonic() - began > _SECONDS:
            self.figures.hangs_over_1_s += 1
            self._keep("slow", request)
        self._judge(request, status, is_open=is_open)

    def _judge(self, request: MutatedRequest, status: int, *, is_open: bool) -> None:
        if status >= 500:
            self.figures.server_errors += 1
            self._keep(f"status {status}", request)
        if not request.target.endswith("/control"):
            return
        may, surely = self._may_accept(request, is_open=is_open)
        accepted = status == 200
        self.figures.accepted += accepted and may
        self.figures.wrongly_accepted += accepted and not may
        self.figures.wrongly_refused += surely and not accepted
        if (accepted and not may) or (surely and not accepted):
            self._keep(f"status {status}", request)

    def _may_accept(self, request: MutatedRequest, *, is_open: bool) -> tuple[bool, bool]:
        """Whether the request may be accepted, and whether it must be."""
        if not (is_open and request.may_steer) or len(request.body) > _CONTROL_BYTES:
            return False, False
        try:
            value = json.loads(request.body.decode(), parse_constant=_refuse)
        except (ValueError, RecursionError):
            return False, False
        if not self._validator.is_valid(value) or value["token"] != self._token:
            return False, False
        # A name that is given twice, and half a surrogate, are things that a schema cannot forbid.
        as_sent = json.dumps(value, ensure_ascii=False).encode("utf-8", "surrogatepass")
        names = [name for name, _ in json.loads(request.body, object_pairs_hook=list)]
        return True, len(names) == len(set(names)) and b"\xed\xa0" not in as_sent

    async def _send_broken(self) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", self._server.port)
        try:
            writer.write(broken_http(self._random))
            writer.write_eof()
            await asyncio.wait_for(reader.read(), _SECONDS)
        except ConnectionError:
            # Closed by the server before all was sent.
            return
        except (asyncio.TimeoutError, TimeoutError):
            self.figures.hangs_over_1_s += 1
        finally:
            writer.close()

    def _keep(self, what: str, request: MutatedRequest) -> None:
        if len(self.kept) < 20:
            self.kept.append(
                f"{what}: {request.method} {request.target[:200]} {request.headers} {request.body[:300]!r}"
            )


def _refuse(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def fuzz_routes(bodies: int, seed: int = 0) -> tuple[FuzzFigures, dict[str, Any]]:
    """Send `bodies` requests; what happened, and what to look at where something should not have."""
    errors = ErrorCounter()
    logger = logging.getLogger("aiohttp.server")
    logger.addHandler(errors)
    began = time.monotonic()
    with LiveServer() as server, TemporaryDirectory() as place:
        question = server.module("code_questions").CodeQuestion(_CODE, Path(place) / "allowed_code.json")
        server.stub.app[server.module("code_routes").QUESTIONS].begin(question)
        asked = (f"/streamblocks/code/{question.id}", question.token, question.code.digest)
        running = server.module("live_streams").running
        open_control, locked_control, open_news, locked_news = (
            CountingControl(),
            CountingControl(),
            LiveNews(),
            LiveNews(),
        )
        locked_inbox = CountingInbox()
        with (
            running("open", "7", None, open_control, open_news, CountingInbox()) as token,
            running("locked", "12:5", None, locked_control, locked_news, locked_inbox),
        ):
            version = locked_news.version
            fuzz = RouteFuzz(server, token, seed, asked)
            server.run(fuzz.run(bodies))
            figures = fuzz.figures
            figures.allowed_without_showing = len(list(Path(place).iterdir()))
            figures.changed_without_token = locked_control.calls + locked_inbox.calls + (locked_news.version != version)
            # Each change of the open stream was asked for by a request that was accepted.
            figures.changed_without_token += abs(open_control.calls - figures.accepted - figures.wrongly_accepted)
    logger.removeHandler(errors)
    figures.crashes += len(errors.records) + len(server.failures)
    told = {"statuses": dict(sorted(fuzz.statuses.items())), "kept": fuzz.kept, "errors": errors.records[:5]}
    return figures, told | {"failures": server.failures[:5], "seconds": round(time.monotonic() - began, 1)}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bodies", type=int, default=100_000, help="requests to send")
    parser.add_argument("--seed", type=int, default=0, help="of the requests")
    parser.add_argument("--json", action="store_true", help="print figures only, as JSON")
    options = parser.parse_args()
    figures, told = fuzz_routes(options.bodies, options.seed)
    print(json.dumps(asdict(figures)) if options.json else json.dumps(asdict(figures) | told, indent=2))


if __name__ == "__main__":
    main()
