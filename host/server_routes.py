"""Puts the pack's routes on ComfyUI's server, where there is one."""

from __future__ import annotations

import logging

from server import PromptServer

logger = logging.getLogger(__name__)


def register_routes() -> None:
    """Add the routes for pages that watch and steer; without a server, do nothing. Never raises."""
    server = PromptServer.instance
    routes, app = getattr(server, "routes", None), getattr(server, "app", None)
    if routes is None or app is None:
        return
    try:
        # Only a server brings aiohttp.
        from .live_routes import add_routes

        add_routes(routes, app)
    except Exception:
        # Catches every error: the nodes work without pages that watch.
        logger.warning("Streams cannot be watched or steered in the page", exc_info=True)
