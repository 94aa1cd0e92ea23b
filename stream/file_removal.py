"""Remove a file that another program may have open."""

from __future__ import annotations

import logging
from pathlib import Path

logger = logging.getLogger(__name__)


def remove_file(path: Path) -> None:
    """Remove a file, if it is there; one that cannot be removed stays, and the log says why."""
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        # Another program has it open, as on Windows.
        logger.warning("%s could not be removed: %s", path, error)
