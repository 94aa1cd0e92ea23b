"""A page, as far as the pack's routes are concerned; standard library only."""

from __future__ import annotations

import http.client
import json
import socket
import struct
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Answer:
    status: int
    body: bytes
    content_type: str

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def error(self) -> str:
        """The one sentence of a refusal."""
        found = self.json
        assert set(found) <= {"error", "id"} and "\n" not in found["error"] and found["error"].endswith(".")
        return found["error"]

    @property
    def news(self) -> tuple[dict[str, Any], list[bytes]]:
        """Header and JPEGs; nothing may be left over."""
        assert (self.status, self.content_type) == (200, "application/octet-stream")
        (length,) = struct.unpack(">I", self.body[:4])
        header, rest = json.loads(self.body[4 : 4 + length]), self.body[4 + length :]
        jpegs = []
        for size in (header["pictures"] or {"lengths": []})["lengths"]:
            jpegs.append(rest[:size])
            rest = rest[size:]
        assert rest == b""
        return header, jpegs


class LiveClient:
    """Asks for one stream of a node."""

    def __init__(self, port: int, prompt_id: str, node: str, token: str = "") -> None:
        self.port, self.token = port, token
        self.path = f"/streamblocks/streams/{prompt_id}/{node}"

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict[str, str] | None = None) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            return Answer(answer.status, answer.read(), answer.headers.get_content_type())
        finally:
            connection.close()

    def news(self, version: int = -1, block: int = -1, points: int = 0, pictures: int | None = None) -> Answer:
        parts = "" if pictures is None else f"&pictures={pictures}"
        return self.ask("GET", f"{self.path}/news?version={version}&block={block}&points={points}{parts}")

    def post(self, body: bytes, content_type: str = "application/json", **headers: str) -> Answer:
        return self.ask("POST", f"{self.path}/control", body, {"Content-Type": content_type, **headers})

    def steer(self, **request: Any) -> Answer:
        return self.post(json.dumps({"token": self.token, **request}).encode())

    def give(self, jpeg: bytes, content_type: str = "image/jpeg", token: str | None = None) -> Answer:
        headers = {"Content-Type": content_type, "X-StreamBlocks-Token": self.token if token is None else token}
        return self.ask("POST", f"{self.path}/frames", jpeg, headers)

    def raw(self, sent: bytes) -> bytes:
        """What the server answers first to bytes that may be no whole request."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=30) as connection:
            connection.sendall(sent)
            return connection.recv(65536)
