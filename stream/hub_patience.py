"""How long the Hugging Face hub may take to answer, and how it is told from a machine without a network."""

from __future__ import annotations

import socket
import threading
import time
import urllib.request
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

from huggingface_hub import constants

from .abandoned_work import work_beside

ResultT = TypeVar("ResultT")

# Seconds until the hub must have been connected to, and must have answered. Its library has other limits for what comes
# after, which are counted from one byte to the next.
_CONNECTED = 4.0
_ANSWERED = 20.0
# An answer that is quicker costs no connection of ours beside it.
_USUAL = 0.5


class HubSilentError(OSError):
    """The hub cannot be connected to, or does not answer."""

    # See CheckpointError.
    __module__ = "builtins"


class HubPatience:
    """Waits for an answer.

    Args:
        check: called some times a second; raises to give up, as at a cancel.
    """

    def __init__(self, check: Callable[[], None]) -> None:
        self._check = check
        self._begun = time.monotonic()
        self._heard = False
        self._attempt: _Connection | None = None

    def hear(self) -> None:
        """The hub has answered: what follows may take its time."""
        self._heard = True

    def run(self, call: Callable[[], ResultT]) -> ResultT:
        """Make a call to the hub, in another thread.

        Raises:
            HubSilentError: no connection in 4 s, or no answer in 20 s.
        """
        return work_beside(call, self._look_up)

    def _look_up(self) -> None:
        self._check()
        waited = time.monotonic() - self._begun
        if self._heard or waited < _USUAL:
            return
        self._attempt = self._attempt or _Connection(constants.ENDPOINT)
        if self._attempt.failure:
            raise HubSilentError(f"no connection to {constants.ENDPOINT}: {self._attempt.failure}; is there a network?")
        if waited >= _CONNECTED and not self._attempt.made:
            raise HubSilentError(f"no connection to {constants.ENDPOINT} in {_CONNECTED:g} s, so there is no network")
        if waited >= _ANSWERED:
            raise HubSilentError(f"{constants.ENDPOINT} is connected to and has not answered in {_ANSWERED:g} s")


class _Connection:
    """An attempt to connect to a server, in a thread that ends by itself.

    Attributes:
        made: whether it is connected to, or would be by a proxy, of which nothing can be said.
        failure: why it is not; empty while that is not known.
    """

    def __init__(self, address: str) -> None:
        self.failure = ""
        place = urlsplit(address)
        host, port = place.hostname or "", place.port or (80 if place.scheme == "http" else 443)
        proxies = urllib.request.getproxies()
        self.made = bool({place.scheme, "all"} & proxies.keys()) and not urllib.request.proxy_bypass(host)
        if not self.made:
            threading.Thread(target=self._connect, args=(host, port), name="streamblocks hub", daemon=True).start()

    def _connect(self, host: str, port: int) -> None:
        try:
            # Looking up the name has no limit of its own: hence a thread.
            socket.create_connection((host, port), timeout=_CONNECTED).close()
        except OSError as error:
            self.failure = str(error) or type(error).__name__
            return
        self.made = True
