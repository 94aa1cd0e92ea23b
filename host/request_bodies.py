"""Bodies of requests, read no further than their limit, and JSON that has one meaning only."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from aiohttp import ClientError, web
from aiohttp.http_exceptions import HttpProcessingError

SECONDS_TO_SEND = 10.0
Handler = Callable[[web.Request], Awaitable[web.Response]]
_SURROGATE = re.compile("[\ud800-\udfff]")


class RefusedRequestError(Exception):
    """A request that cannot be answered, with the sentence that says why.

    Args:
        status: of the answer, 4xx.
        sentence: for people.
        message: the id under which pages have it in their language; "" for what no page of ours can cause.
    """

    def __init__(self, status: int, sentence: str, message: str = "") -> None:
        super().__init__(sentence)
        self.status = status
        self.message = message

    def answer(self) -> dict[str, str]:
        """What is sent, as JSON values."""
        return {"error": str(self)} | ({"id": self.message} if self.message else {})


def answered(handler: Handler) -> Handler:
    """The handler, with refusals as answers."""

    async def answer(request: web.Request) -> web.Response:
        try:
            return await handler(request)
        except RefusedRequestError as refusal:
            return web.json_response(refusal.answer(), status=refusal.status)

    return answer


async def read_body(request: web.Request, content_type: str, limit: int) -> bytes:
    """The whole body.

    Raises:
        RefusedRequestError: it is of another type, packed, longer than `limit` bytes, broken, or slow.
    """
    given = request.content_type
    if given != content_type:
        raise RefusedRequestError(415, f"The body is {given[:80]}: send {content_type}.")
    if request.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise RefusedRequestError(415, "The body is packed: send it without Content-Encoding.")
    try:
        return await asyncio.wait_for(_read(request, limit), SECONDS_TO_SEND)
    except (asyncio.TimeoutError, TimeoutError):
        raise RefusedRequestError(
            408, f"The body did not come within {SECONDS_TO_SEND:.0f} s: send it at once."
        ) from None
    except (web.RequestPayloadError, HttpProcessingError, ClientError, ConnectionError):
        raise RefusedRequestError(400, "The body is broken off or wrongly chunked: send it whole.") from None


async def _read(request: web.Request, limit: int) -> bytes:
    too_long = RefusedRequestError(413, f"The body is longer than {limit:,} bytes: send less.", "refused_too_long")
    if (request.content_length or 0) > limit:
        raise too_long
    body = bytearray()
    while piece := await request.content.read(limit + 1 - len(body)):
        body += piece
        if len(body) > limit:
            raise too_long
    return bytes(body)


def parse_json(body: bytes) -> Any:  # noqa: ANN401
    """The value of a JSON text in UTF-8.

    Raises:
        RefusedRequestError: it is none, is nested too deeply, names something twice, or has an impossible number or
            text.
    """
    try:
        text = body.decode()
        return json.loads(text, object_pairs_hook=_object, parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise RefusedRequestError(400, f"The body is not UTF-8 at byte {error.start}: send JSON in UTF-8.") from None
    except RecursionError:
        raise RefusedRequestError(400, "The body is nested too deeply: send an object of texts and numbers.") from None
    except json.JSONDecodeError as error:
        raise RefusedRequestError(400, f"The body is not JSON at character {error.pos}: send a JSON object.") from None
    except ValueError:
        # Python reads whole numbers of up to 4,300 digits.
        raise RefusedRequestError(400, "The body has a number of thousands of digits: send a shorter one.") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise RefusedRequestError(400, "The body names something twice: give each name once.")
    if any(isinstance(text, str) and _SURROGATE.search(text) for pair in pairs for text in pair):
        raise RefusedRequestError(
            400, "A text of the body has half of a surrogate pair: send whole characters.", "refused_half_character"
        )
    return found


def _refuse_constant(name: str) -> NoReturn:
    raise RefusedRequestError(400, f"The body has the number {name}: give a finite one.")
