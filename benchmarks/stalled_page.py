"""What a page that stops reading costs a stream: block times in real ComfyUI without it and with it, in one run.

    python benchmarks/stalled_page.py [--seconds 30] [--rounds 2] [--json]

ComfyUI is looked for as by the tests (`$COMFYUI_PATH`). One endless stream of the mini model is queued by a page whose
websocket, and five of whose requests for news, stop being read in every second stretch of the run. The times are those
between blocks as a page sees them that reads on.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import itertools
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from streamblocks_path import ROOT

sys.path.insert(0, str(ROOT / "tests"))
from comfyui_server import ComfyUIServer

NODE = "2"
CLIENT = "the-page-that-stalls"
_SMALL_BUFFER = 4096


def prompt_of(size: int) -> dict[str, Any]:
    """An endless stream, in API format."""
    prompt: dict[str, Any] = json.loads((ROOT / "tests/api_workflows/text_to_video_stream.json").read_text())
    prompt[NODE]["inputs"] |= {"endless": True, "width": size, "height": size, "seed": 1}
    return prompt


@dataclass
class Reader:
    """A page that reads the news as they come."""

    port: int
    path: str
    version: int = -1
    block: int = -1

    def next_block(self) -> float:
        """Wait for another block; returns when it came, in seconds."""
        while True:
            header = self._header()
            block = header["blocks_made"] - 1
            if block > self.block:
                self.block = block
                return time.perf_counter()

    def _header(self) -> dict[str, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("GET", f"{self.path}/news?version={self.version}&block={self.block}&points=0")
            body = connection.getresponse().read()
        finally:
            connection.close()
        (length,) = struct.unpack(">I", body[:4])
        header: dict[str, Any] = json.loads(body[4 : 4 + length])
        self.version = header["version"]
        return header


def stalled_socket(port: int, request: str) -> socket.socket:
    """A connection that asks and never reads."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_BUFFER)
    connection.connect(("127.0.0.1", port))
    connection.sendall(request.encode())
    return connection


def stall(port: int, path: str) -> list[socket.socket]:
    """A page that has stopped: its websocket, and news that it asked for."""
    key = base64.b64encode(os.urandom(16)).decode()
    upgrade = f"Upgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Version: 13\r\nSec-WebSocket-Key: {key}\r\n"
    asked = f"GET {path}/news?version=-1&block=-1&points=0 HTTP/1.1\r\nHost: localhost\r\n\r\n"
    return [
        stalled_socket(port, f"GET /ws?clientId={CLIENT} HTTP/1.1\r\nHost: localhost\r\n{upgrade}\r\n"),
        *(stalled_socket(port, asked) for _ in range(5)),
    ]


def block_seconds(reader: Reader, seconds: float) -> list[float]:
    """Times between blocks for that long."""
    times = [reader.next_block()]
    while times[-1] - times[0] < seconds:
        times.append(reader.next_block())
    return [later - earlier for earlier, later in itertools.pairwise(times)]


def measure(seconds: float, rounds: int, size: int) -> dict[str, Any]:
    """Median seconds of a block with every page reading, and with one that has stopped."""
    reading: list[float] = []
    stalled: list[float] = []
    with tempfile.TemporaryDirectory() as folder, ComfyUIServer(Path(folder), packs={"pack": ROOT}) as server:
        answer = server.post("/prompt", {"prompt": prompt_of(size), "client_id": CLIENT})
        path = f"/streamblocks/streams/{answer['prompt_id']}/{NODE}"
        while not server.get("/streamblocks/streams")["streams"]:
            time.sleep(0.2)
        reader = Reader(server.port, path)
        # The first blocks load and warm up.
        for _ in range(5):
            reader.next_block()
        for _ in range(rounds):
            reading += block_seconds(reader, seconds)
            connections = stall(server.port, path)
            stalled += block_seconds(reader, seconds)
            for connection in connections:
                connection.close()
        server.interrupt()
    medians = statistics.median(reading), statistics.median(stalled)
    return {
        "seconds_reading": round(medians[0], 4),
        "seconds_stalled": round(medians[1], 4),
        "ratio": round(medians[1] / medians[0], 4),
        "blocks": [len(reading), len(stalled)],
        "longest_stalled": round(max(stalled), 4),
        "longest_reading": round(max(reading), 4),
    }


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=30.0, help="of each stretch")
    parser.add_argument("--rounds", type=int, default=2, help="of two stretches")
    parser.add_argument("--size", type=int, default=64, help="pixels a side")
    parser.add_argument("--json", action="store_true", help="print nothing but the figures")
    options = parser.parse_args()
    figures = measure(options.seconds, options.rounds, options.size)
    if options.json:
        print(json.dumps(figures))
        return
    print(f"a block with every page reading: {figures['seconds_reading']:.3f} s, with one stopped: ", end="")
    print(f"{figures['seconds_stalled']:.3f} s; {100 * (figures['ratio'] - 1):+.1f} %, {figures['blocks']} blocks")


if __name__ == "__main__":
    main()
