"""The routes by which the page of this machine shows a repository's code and allows it.

See docs/architecture.md, "A workflow is not consent". Both are POST: a browser names the origin of each.
"""

from __future__ import annotations

import asyncio
import ipaddress
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web

from ..stream.code_consent import allow_code
from ..stream.shown_code import shown_code
from .code_questions import CodeQuestion, CodeQuestions
from .request_bodies import RefusedRequestError, answered, parse_json, read_body

QUESTIONS: web.AppKey[CodeQuestions] = web.AppKey("streamblocks_code_questions", CodeQuestions)
_ONE = "/streamblocks/code/{id}"
_BYTES = 4096
# What proxies add: behind one, the peer is the proxy and not who asks.
_PROXY_HEADERS = ("Forwarded", "Via", "X-Forwarded-For", "X-Forwarded-Host", "X-Forwarded-Proto", "X-Real-IP")
_ELSEWHERE = "Code is allowed from the page on ComfyUI's own machine only: use tools/allow_code.py there."


def add_code_routes(routes: web.RouteTableDef, app: web.Application) -> None:
    """Add the routes and the questions that they answer."""
    app[QUESTIONS] = CodeQuestions()
    routes.post(f"{_ONE}/show")(answered(show))
    routes.post(f"{_ONE}/allow")(answered(allow))


async def show(request: web.Request) -> web.Response:
    """The files of a question, and a nonce for one answer."""
    _check_same_machine(request)
    question, _ = await _question(request, {"token"})
    body = await asyncio.to_thread(shown_code, question.code)
    return web.json_response({**body, "nonce": question.show()}, headers={"Cache-Control": "no-store"})


async def allow(request: web.Request) -> web.Response:
    """Write the consent of the user, who has seen the files."""
    _check_same_machine(request)
    question, asked = await _question(request, {"token", "nonce", "digest"})
    if not question.takes(asked["nonce"]):
        raise RefusedRequestError(
            403, "The files were not shown for this answer: look at them again.", "refused_code_unseen"
        )
    if asked["digest"] != question.code.digest:
        raise RefusedRequestError(
            409, "The digest is not that of the files that were shown: look at them again.", "refused_code_unseen"
        )
    try:
        await asyncio.to_thread(allow_code, question.file, question.code)
    except (OSError, ValueError) as error:
        raise RefusedRequestError(409, f"The consent cannot be written: {error}", "refused_code_unwritten") from None
    _questions(request).end(question)
    return web.json_response({"allowed": question.code.digest})


async def _question(request: web.Request, names: set[str]) -> tuple[CodeQuestion, dict[str, str]]:
    asked: Any = parse_json(await read_body(request, "application/json", _BYTES))
    if not isinstance(asked, dict) or set(asked) != names or not all(isinstance(one, str) for one in asked.values()):
        raise RefusedRequestError(
            400, f"The body is not an object of the texts {', '.join(sorted(names))}: send those."
        )
    question = _questions(request).find(request.match_info["id"])
    # One answer for both: ids are no secret, and say nothing.
    if question is None or not question.admits(asked["token"]):
        raise RefusedRequestError(
            403, "There is no such question to this page: run the workflow again from it.", "refused_code_gone"
        )
    return question, asked


def _questions(request: web.Request) -> CodeQuestions:
    return request.app[QUESTIONS]


def _check_same_machine(request: web.Request) -> None:
    """Refuse another machine, another site, and a name of this machine that is not its own (DNS rebinding)."""
    peer = request.transport.get_extra_info("peername") if request.transport is not None else None
    host = request.headers.get("Host", "")
    if not (isinstance(peer, tuple) and _is_loopback(str(peer[0])) and _is_loopback(_name_of(host))):
        raise RefusedRequestError(403, _ELSEWHERE)
    if any(name in request.headers for name in _PROXY_HEADERS):
        raise RefusedRequestError(403, _ELSEWHERE)
    origin = request.headers.get("Origin", "")
    if origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
        raise RefusedRequestError(403, "The request comes from another site: allow code from ComfyUI's own page.")
    if request.headers.get("Sec-Fetch-Site", "same-origin") != "same-origin":
        raise RefusedRequestError(403, "The request comes from another site: allow code from ComfyUI's own page.")


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_loopback(name: str) -> bool:
    """Whether a name is localhost or an address of it; nothing is looked up, for whose answer would that be?"""
    if name == "localhost":
        return True
    try:
        address = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(address, "ipv4_mapped", None)
    return (mapped or address).is_loopback
