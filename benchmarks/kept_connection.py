"""HTTP/1.1 over one connection, for requests that are written by hand."""

from __future__ import annotations

import asyncio


class KeptConnection:
    """A connection that is kept while the server keeps it."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ask(self, request: bytes, *, has_body: bool = True) -> tuple[int, bytes]:
        """Status and body of the answer; asks anew where the server had closed the connection behind an earlier answer.

        Raises:
            EOFError: the connection ended first.
            ConnectionError: so it did.
        """
        is_kept = self._streams is not None
        try:
            return await self._ask(request, has_body)
        except (EOFError, ConnectionError):
            self.close()
            if not is_kept:
                raise
            return await self._ask(request, has_body)

    async def _ask(self, request: bytes, has_body: bool) -> tuple[int, bytes]:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
        lengths = [line[15:] for line in head.split("\r\n") if line.startswith("content-length:")]
        body = await reader.readexactly(int(lengths[0]) if lengths and has_body else 0)
        if "connection: close" in head:
            self.close()
        return int(head.split(" ", 2)[1]), body

    def close(self) -> None:
        """Connect anew for the next request."""
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None
