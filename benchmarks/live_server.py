"""The pack's routes on a real aiohttp server in a thread, without ComfyUI.

with LiveServer() as server, server.module("live_streams").running("prompt", "7", None, control, news) as token:
    requests to server.port
"""

from __future__ import annotations

import asyncio
import importlib
import sys
import threading
from collections.abc import Coroutine
from types import ModuleType, TracebackType
from typing import Any, TypeVar

import streamblocks_path
from aiohttp import web

T = TypeVar("T")
_HOST = f"{streamblocks_path.PACKAGE}.host"


class StubPromptServer:
    """As much of ComfyUI's `PromptServer` as the pack's routes use.

    Attributes:
        sent: (event, message, client) of each message to pages.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop | None = None) -> None:
        self.loop = loop
        self.app = web.Application()
        self.routes = web.RouteTableDef()
        self.client_id: str | None = "the page"
        self.sent: list[tuple[str, dict[str, Any], str]] = []

    def send_sync(self, event: str, message: dict[str, Any], client: str) -> None:
        """Keep what would be sent."""
        self.sent.append((event, message, client))


class LiveServer:
    """A server on a free loopback port; a context manager.

    Attributes:
        port: of the server.
        stub: the stand-in for ComfyUI's server.
        failures: errors that nobody caught on the server's loop.
    """

    port: int

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self.stub = StubPromptServer(self._loop)
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self.failures: list[str] = []
        self._loop.set_exception_handler(lambda _, context: self.failures.append(str(context)))
        self._modules: dict[str, ModuleType | None] = {}

    def module(self, name: str) -> Any:  # noqa: ANN401
        """A module of `host/`, such as "live_streams", with the stand-in as ComfyUI's server."""
        return importlib.import_module(f"{_HOST}.{name}")

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something on the server's loop, and wait for it."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result()

    def __enter__(self) -> LiveServer:
        self._stand_in()
        self.module("server_routes").register_routes()
        self._thread.start()
        self.run(self._start())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.run(self._runner.cleanup())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
        self._give_back()

    async def _start(self) -> None:
        self.stub.app.add_routes(self.stub.routes)
        # Requests that wait for news end at once.
        self._runner = web.AppRunner(self.stub.app, access_log=None, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.port = self._runner.addresses[0][1]

    def _stand_in(self) -> None:
        """Have `server` and `host` in `sys.modules` that need no ComfyUI."""
        stub, room = ModuleType("server"), ModuleType(_HOST)
        stub.PromptServer = type("PromptServer", (), {"instance": self.stub})  # type: ignore[attr-defined]
        room.__path__ = [str(streamblocks_path.ROOT / "host")]
        names = [name for name in sys.modules if name.startswith(f"{_HOST}.")]
        self._modules = {name: sys.modules.pop(name, None) for name in ("server", _HOST, *names)}
        sys.modules["server"], sys.modules[_HOST] = stub, room

    def _give_back(self) -> None:
        for name in [name for name in sys.modules if name.startswith(f"{_HOST}.")]:
            del sys.modules[name]
        for name, module in self._modules.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
