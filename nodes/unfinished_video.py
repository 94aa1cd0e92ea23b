"""What becomes of the pictures of a stream that was cancelled or failed."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .. import host
from ..stream.sinks import Mp4Sink
from ..stream.unfinished_video import move_unfinished

logger = logging.getLogger(__name__)

# In ComfyUI's output folder.
UNFINISHED = "streamblocks/unfinished/stream"


class UnfinishedVideo:
    """Keeps what a stream has made when it ends early: a file in the output folder, and a link to it on the node.

    Args:
        progress: of the node.
        hidden: the node's hidden inputs, with prompt and workflow; None outside of a prompt.
    """

    def __init__(self, progress: host.StreamProgress, hidden: Any) -> None:  # noqa: ANN401
        self._progress = progress
        self._prompt = None if hidden is None else hidden.prompt
        self._extra = (None if hidden is None else hidden.extra_pnginfo) or {}

    def keep(self, video: Mp4Sink) -> bool:
        """Move the file of `video`, which is closed, out of the temp folder, and say where it is; False without one.

        Raises nothing of its own: it runs while the error that ended the stream is on its way.
        """
        if video.frames_written == 0:
            return False
        made = f"Stopped; the {video.frames_written} pictures made so far are in "
        try:
            kept, shown, with_workflow = self._move(video.path)
        except Exception as error:
            # Catches every error: the one that ended the stream is the one to be seen.
            logger.warning("moving %s to the output folder failed", video.path, exc_info=True)
            self._say(
                f"{made}{video.path}, which ComfyUI deletes when it starts, because they could not be moved to the "
                f"output folder ({error}): copy the file."
            )
            return True
        lost = "" if with_workflow else ", without the workflow, which could not be written (the log says why)"
        logger.warning("%s%s%s", made, kept, lost)
        self._progress.say(f"{made}{shown['subfolder']}/{shown['filename']} in the output folder{lost}")
        self._progress.show_unfinished({**shown, "pictures": video.frames_written, "workflow": self._workflow_id()})
        host.list_as_asset(kept)
        return True

    def _move(self, source: Path) -> tuple[Path, dict[str, str], bool]:
        metadata = host.workflow_metadata(self._prompt, self._extra)
        target, shown = host.reserve_output_file(UNFINISHED, ".mp4")
        return target, shown, move_unfinished(source, target, metadata)

    def _say(self, message: str) -> None:
        logger.warning(message)
        self._progress.say(message)

    def _workflow_id(self) -> str | None:
        """The page's own id of the workflow: node ids repeat from one workflow to the next."""
        workflow = self._extra.get("workflow")
        return workflow.get("id") if isinstance(workflow, dict) else None
