"""The routes by which pages watch and steer running streams; see docs/architecture.md, "Watching and steering"."""

from __future__ import annotations

import asyncio
import json
import struct
from typing import Any
from weakref import WeakKeyDictionary

from aiohttp import web

from ..stream.live_control import EditRefusedError, LiveControl
from ..stream.live_news import NewsPage
from ..stream.picture_encoding import BlockPictures, EncodedPictures
from .code_routes import add_code_routes
from .control_request import ControlRequest, read_control
from .live_registry import LiveStream, LiveStreams
from .live_waiting import wait_for_news
from .request_bodies import RefusedRequestError, answered, parse_json, read_body

MOST_WAITING = 64
CONTROL_BYTES = 64 * 2**10
FRAME_BYTES = 2 * 2**20
TOKEN_HEADER = "X-StreamBlocks-Token"

STREAMS: web.AppKey[LiveStreams] = web.AppKey("streamblocks_streams", LiveStreams)
# Pages that ask for one block's pictures together wait for one encoding.
_ENCODINGS: web.AppKey[Any] = web.AppKey("streamblocks_encodings", WeakKeyDictionary)

_ROOT = "/streamblocks"
_ONE = f"{_ROOT}/streams/{{prompt_id}}/{{node}}"


def add_routes(routes: web.RouteTableDef, app: web.Application) -> None:
    """Add the routes and their registry, unless that was done, be it by another copy of the pack."""
    if any(isinstance(route, web.RouteDef) and route.path.startswith(f"{_ROOT}/") for route in routes):
        return
    app[STREAMS], app[_ENCODINGS] = LiveStreams(), WeakKeyDictionary()
    routes.get(f"{_ROOT}/streams")(answered(list_streams))
    routes.get(f"{_ROOT}/control-schema")(answered(control_schema))
    routes.get(f"{_ONE}/news")(answered(news))
    routes.post(f"{_ONE}/control")(answered(control))
    routes.post(f"{_ONE}/frames")(answered(frames))
    add_code_routes(routes, app)


async def list_streams(request: web.Request) -> web.Response:
    """Which streams there are, without their tokens."""
    return web.json_response({"streams": [_listed(stream) for stream in _streams(request).listed()]})


async def control_schema(request: web.Request) -> web.Response:
    """The JSON schema of a request that steers."""
    return web.json_response(ControlRequest.model_json_schema())


async def news(request: web.Request) -> web.Response:
    """What a page has not seen of a stream, once there is something: header and JPEGs."""
    stream = _stream(request)
    asked = (("version", -1), ("block", -1), ("points", 0), ("pictures", -1))
    version, block, points, pictures = (_number(request, *one) for one in asked)
    if stream.waiting >= MOST_WAITING:
        raise RefusedRequestError(503, f"{MOST_WAITING} requests wait for this stream's news already: ask again later.")
    stream.waiting += 1
    try:
        if not await wait_for_news(request, stream.news, version):
            return web.Response(status=204)
        # Whoever says how many pictures of the block it has takes blocks in parts.
        page = stream.news.since(block, points, version, pictures if pictures >= 0 else None)
        body = await _news_body(request, stream, page)
    finally:
        stream.waiting -= 1
    return web.Response(body=body, content_type="application/octet-stream", headers={"Cache-Control": "no-store"})


async def control(request: web.Request) -> web.Response:
    """Edit, pause, resume or stop a stream."""
    stream = _stream(request)
    asked = read_control(parse_json(await read_body(request, "application/json", CONTROL_BYTES)))
    _check_token(stream, asked.token)
    mailbox = stream.control
    if mailbox is None:
        raise RefusedRequestError(409, "The stream has ended: nothing of it can be changed any more.", "refused_ended")
    _steer(mailbox, asked)
    # All pages are told what waits now, whoever asked for it.
    return web.json_response({"version": stream.news.update()})


async def frames(request: web.Request) -> web.Response:
    """Give a stream a picture of the page's; `dropped` is 1 where a newer one took its place."""
    stream = _stream(request)
    # Before two megabytes are read.
    _check_token(stream, request.headers.get(TOKEN_HEADER, ""))
    if stream.inbox is None:
        ended = stream.control is None
        raise RefusedRequestError(
            409, "The stream has ended." if ended else "This stream takes no frames.", "refused_ended" if ended else ""
        )
    jpeg = await read_body(request, "image/jpeg", FRAME_BYTES)
    inbox = stream.inbox
    if inbox is None:
        raise RefusedRequestError(409, "The stream has ended.", "refused_ended")
    if not jpeg.startswith(b"\xff\xd8\xff"):
        raise RefusedRequestError(400, "The body is no JPEG: send one picture as JPEG.", "refused_picture")
    try:
        taken = await stream.turns.run(lambda: inbox.put(jpeg))
    except ValueError as error:
        raise RefusedRequestError(400, str(error), "refused_picture") from None
    return web.json_response({"dropped": int(not taken), "fps": stream.news.fps})


def _steer(mailbox: LiveControl, asked: ControlRequest) -> None:
    if asked.action == "edit":
        try:
            mailbox.edit(asked.edit())
        except EditRefusedError as refusal:
            raise RefusedRequestError(409, str(refusal), refusal.message) from None
    elif asked.action == "pause":
        mailbox.pause()
    elif asked.action == "resume":
        mailbox.resume()
    else:
        mailbox.stop()


def _listed(stream: LiveStream) -> dict[str, Any]:
    ids = {"prompt_id": stream.prompt_id, "node": stream.node, "workflow": stream.workflow}
    takes_frames = {"frames_from": stream.frames_from} if stream.inbox is not None else {}
    return {**ids, "running": stream.control is not None, **takes_frames}


def _streams(request: web.Request) -> LiveStreams:
    return request.app[STREAMS]


def _stream(request: web.Request) -> LiveStream:
    stream = _streams(request).find(request.match_info["prompt_id"], request.match_info["node"])
    if stream is None:
        raise RefusedRequestError(
            404, "There is no stream of this prompt and node: ask for the list of streams.", "gone"
        )
    return stream


def _check_token(stream: LiveStream, token: str) -> None:
    if not stream.admits(token):
        raise RefusedRequestError(
            403, "The token is not this stream's: steer from the page that queued the prompt.", "refused_token"
        )


def _number(request: web.Request, name: str, otherwise: int) -> int:
    text = request.query.get(name, str(otherwise))
    if not (text.removeprefix("-").isdecimal() and text.isascii() and len(text) <= 18):
        raise RefusedRequestError(400, f"{name} is {text[:40]!r}: give a whole number.")
    return int(text)


async def _news_body(request: web.Request, stream: LiveStream, page: NewsPage) -> bytes:
    """The length of the header, big-endian in 4 bytes, the header, then the JPEGs one behind the other."""
    ids = {"prompt_id": stream.prompt_id, "node": stream.node, "workflow": stream.workflow}
    header: dict[str, Any] = {**page.header, **ids, "pictures": None}
    jpegs: tuple[bytes, ...] = ()
    if page.pictures is not None:
        parts = (page.pictures, *page.more)
        encoded = [await _encoded(request.app[_ENCODINGS], part) for part in parts]
        jpegs = tuple(jpeg for one in encoded for jpeg in one.jpegs)
        header["pictures"] = {
            "block": page.pictures.block,
            "first": page.pictures.first,
            "end": parts[-1].end,
            "of": page.pictures.of,
            "width": encoded[0].width,
            "height": encoded[0].height,
            "lengths": [len(jpeg) for jpeg in jpegs],
        }
    text = json.dumps(header).encode()
    return b"".join((struct.pack(">I", len(text)), text, *jpegs))


async def _encoded(
    encodings: WeakKeyDictionary[BlockPictures, asyncio.Future[EncodedPictures]], pictures: BlockPictures
) -> EncodedPictures:
    if pictures not in encodings:
        encodings[pictures] = asyncio.get_running_loop().run_in_executor(None, pictures.encoded)
    # A page that goes takes no other page's pictures with it.
    return await asyncio.shield(encodings[pictures])
