"""Requests to the pack's routes, most of them wrong in some way, for `fuzz_routes.py` and the tests."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

JSON_TYPE = "application/json"
# (Content-Type, whether it is JSON's)
_TYPES = (
    ("application/json; charset=utf-8", True),
    ("Application/JSON", True),
    ("application/json;charset=utf-16", True),
    ("text/plain", False),
    ("application/x-www-form-urlencoded", False),
    ("application/jsonx", False),
    ("multipart/form-data; boundary=x", False),
    ("", False),
    ("/", False),
    ("application/json, text/plain", False),
    ("x" * 4000, False),
)
_PATHS = (
    "/..",
    "//",
    "/%2e%2e",
    "/%00",
    "/%ed%a0%80",
    "/%",
    "/a/b/c",
    "?x=1&x=2",
    ";a=b",
    "/%2F",
    "/ü",
    "/" + "a" * 3000,
)
_ORIGINS = ("null", "", "http://evil.example", "http://localhost.evil.example", "https://LOCALHOST", "http://[::1")
_TEXTS = (
    "",
    " ",
    "a",
    "x" * 10_000,
    "x" * 10_001,
    "ü" * 9_999,
    "\x00",
    "\ud800",
    "😀",
    "edit",
    "null",
    "../../etc/passwd",
)
_NUMBERS = (0, 1, -1, 0.5, -0.0, 1e-320, 1.0000001, 2**63, 10**400, math.nan, math.inf, -math.inf, 1e308)
_OTHERS: tuple[Any, ...] = (None, True, False, [], {}, [0.5], {"a": 1}, [["a"]])
_ACTIONS = ("edit", "pause", "resume", "stop", "Edit", "EDIT ", "delete", "__class__")
_VALUES = ("prompt", "strength", "attention_bias")


@dataclass(frozen=True)
class MutatedRequest:
    """One request.

    Attributes:
        method: of HTTP.
        target: path and query.
        headers: without those that say how long the body is.
        body: as it is sent.
        chunked: whether it is sent in pieces without its length.
        may_steer: whether place, method and headers are those of a request that steers; the body may still be wrong.
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    chunked: bool = False
    may_steer: bool = True

    def written(self, piece: int = 1000) -> bytes:
        """The request as bytes of HTTP/1.1, in chunks of `piece` bytes where it is chunked."""
        head = [f"{self.method} {self.target} HTTP/1.1", "Host: localhost", *(f"{k}: {v}" for k, v in self.headers)]
        if not self.chunked:
            head.append(f"Content-Length: {len(self.body)}")
            return "\r\n".join([*head, "", ""]).encode() + self.body
        pieces = [self.body[at : at + piece] for at in range(0, len(self.body), piece)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(one), one) for one in pieces)
        return "\r\n".join([*head, "Transfer-Encoding: chunked", "", ""]).encode() + chunks + b"0\r\n\r\n"


class RequestMaker:
    """Makes requests by a seed.

    Args:
        seed: same seed, same requests.
        token: that the stream takes; None where no request may have it.
        stream: the path of the stream.
        question: a question about code, as its path, token and digest; no request has its nonce.
    """

    def __init__(
        self,
        seed: int,
        token: str | None,
        stream: str,
        question: tuple[str, str, str] = ("/streamblocks/code/x", "", ""),
    ) -> None:
        self._random = random.Random(seed)
        self._token = token
        self._stream = stream
        self._question = question

    def make(self) -> MutatedRequest:
        """The next request."""
        ways: tuple[Callable[[], MutatedRequest], ...] = (
            self._headers,
            self._place,
            self._news,
            self._frames,
            self._code,
        )
        if self._random.random() < 0.15:
            return self._random.choice(ways)()
        chunked = self._random.random() < 0.05
        return self._control(self.body(), chunked=chunked)

    def body(self) -> bytes:
        """A body for the control route."""
        value = self.value()
        text = json.dumps(value, ensure_ascii=self._random.random() < 0.7).encode("utf-8", "surrogatepass")
        return self._damaged(text) if self._random.random() < 0.25 else text

    def value(self) -> Any:  # noqa: ANN401
        """A JSON value near to what the control route takes."""
        value = self._right()
        if self._token is None:
            value["token"] = self._random.choice(("", "x", "A" * 43, "x" * 201, "\ud800", None, 0, True, [], "ü"))
        for _ in range(self._random.choice((0, 0, 1, 1, 1, 2, 3))):
            self._mutate(value)
        return value if self._random.random() < 0.98 else self._random.choice((*_OTHERS, [value], json.dumps(value)))

    def _right(self) -> dict[str, Any]:
        value: dict[str, Any] = {"token": self._token, "action": self._random.choice(_ACTIONS[:3])}
        if value["action"] == "edit":
            rights = ("a calm sea", self._random.random(), 1 - self._random.random())
            for name, right in zip(_VALUES, rights, strict=True):
                if self._random.random() < 0.6:
                    value[name] = right
        return value

    def _mutate(self, value: dict[str, Any]) -> None:
        name = self._random.choice(("action", *_VALUES, *_VALUES, "extra", "__proto__", "Prompt", "\ud800", "token"))
        if name == "action":
            value[name] = self._random.choice((*_ACTIONS, *_OTHERS))
        elif self._random.random() < 0.2:
            value.pop(name, None)
        elif name != "token" or self._token is None or self._random.random() < 0.3:
            value[name] = self._random.choice((*_TEXTS, *_NUMBERS, *_OTHERS))

    def _damaged(self, text: bytes) -> bytes:
        """Bytes that are changed somewhere."""
        pick = self._random
        at = pick.randrange(len(text) + 1)
        ways: tuple[Callable[[], bytes], ...] = (
            lambda: text[:at],
            lambda: text[:at] + pick.randbytes(pick.choice((1, 2, 8))) + text[at:],
            lambda: text[:at] + text[at + 1 :],
            lambda: text * 2,
            lambda: b"\xef\xbb\xbf" + text,
            lambda: text.decode("utf-8", "replace").encode("utf-16"),
            lambda: text[:-1] + b"," + text[1:],
            lambda: text[:-1] + b', "deep": ' + b"[" * pick.choice((10, 3000, 60_000)),
            lambda: text + b" " * pick.choice((10, 60_000, 65_536, 100_000)),
            lambda: text[:-1] + b', "big": ' + b"9" * pick.choice((20, 5000, 60_000)) + b"}",
            lambda: b"",
        )
        return pick.choice(ways)()

    def _control(self, body: bytes, *, chunked: bool = False) -> MutatedRequest:
        return MutatedRequest("POST", f"{self._stream}/control", (("Content-Type", JSON_TYPE),), body, chunked)

    def _headers(self) -> MutatedRequest:
        given, is_json = self._random.choice(_TYPES)
        headers = [("Content-Type", given)]
        packed = self._random.random() < 0.2
        if packed:
            headers.append(("Content-Encoding", self._random.choice(("gzip", "deflate", "br", "x"))))
        headers.append(("X-Filler", "f" * self._random.choice((0, 10, 7000))))
        return MutatedRequest(
            "POST", f"{self._stream}/control", tuple(headers), self.body(), may_steer=is_json and not packed
        )

    def _place(self) -> MutatedRequest:
        method = self._random.choice(("POST", "GET", "PUT", "DELETE", "OPTIONS", "PATCH", "HEAD", "FOO"))
        cut = self._random.randrange(len(self._stream))
        target = self._random.choice((self._stream[:cut] or "/", self._stream, "/streamblocks/streams"))
        target += self._random.choice(_PATHS)
        headers = (("Content-Type", JSON_TYPE),)
        return MutatedRequest(method, target.replace(" ", ""), headers, self.body(), may_steer=False)

    def _news(self) -> MutatedRequest:
        names = ("version", "block", "points", "x")
        values = ("-1", "0", "-2", "9" * 18, "9" * 30, "1.5", "", "%00", "%D9%A1", "-", "--1", "+1", "1e3", "nan")
        query = "&".join(f"{self._random.choice(names)}={self._random.choice(values)}" for _ in range(3))
        return MutatedRequest("GET", f"{self._stream}/news?{query}", (), b"", may_steer=False)

    def _frames(self) -> MutatedRequest:
        token = self._random.choice((self._token or "x", "", "x", "A" * 43))
        given = self._random.choice(("image/jpeg", "image/png", JSON_TYPE))
        body = self._random.choice((b"", b"\xff\xd8\xff", b"x")) + self._random.randbytes(self._random.choice((0, 999)))
        headers = (("Content-Type", given), ("X-StreamBlocks-Token", token))
        return MutatedRequest("POST", f"{self._stream}/frames", headers, body, may_steer=False)

    def _code(self) -> MutatedRequest:
        pick = self._random
        path, token, digest = self._question
        value: dict[str, Any] = {"token": pick.choice((token, token, "", "x"))}
        action = pick.choice(("show", "allow"))
        if action == "allow":
            value |= {"nonce": pick.choice(("", "x", token, "A" * 43, None, True)), "digest": pick.choice((digest, ""))}
        for _ in range(pick.choice((0, 0, 1, 2))):
            key = pick.choice((*value, "nonce", "a", "\ud800"))
            value[key] = pick.choice((*_TEXTS, *_NUMBERS, *_OTHERS))
        text = json.dumps(value, ensure_ascii=pick.random() < 0.7).encode("utf-8", "surrogatepass")
        headers = [("Content-Type", JSON_TYPE), ("Origin", pick.choice((*["http://localhost"] * 6, *_ORIGINS)))]
        if pick.random() < 0.2:
            headers.append(
                pick.choice((("Sec-Fetch-Site", "cross-site"), ("Via", "x"), ("X-Forwarded-For", "127.0.0.1")))
            )
        target = f"{path}{pick.choice((*[''] * 8, 'x', '%00', '/..'))}/{action}"
        body = self._damaged(text) if pick.random() < 0.25 else text
        return MutatedRequest("POST", target, tuple(headers), body, may_steer=False)


def broken_http(pick: random.Random) -> bytes:
    """Bytes that are no request of HTTP, or half of one."""
    right = b"POST /streamblocks/streams/p/1/control HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return pick.choice(
        (
            pick.randbytes(pick.choice((1, 40, 3000))),
            right + b"Content-Length: -1\r\n\r\n{}",
            right + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\n{}",
            right + b"Content-Length: 99\r\n\r\n{}",
            right + b"Content-Length: 9" + b"9" * 400 + b"\r\n\r\n{}",
            right + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n{}",
            right + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}",
            right + b"Transfer-Encoding: chunked\r\nContent-Length: 2\r\n\r\n2\r\n{}\r\n0\r\n\r\n",
            right + b"Bad Header\r\n\r\n",
            right + b"A: " + b"x" * 20_000 + b"\r\n\r\n",
            right[: pick.randrange(len(right))],
            right.replace(b"HTTP/1.1", b"HTTP/9.9") + b"\r\n",
            right.replace(b"POST ", b"PO\x00ST ") + b"\r\n",
        )
    )
