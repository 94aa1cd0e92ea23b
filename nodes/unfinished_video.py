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

    def keep(self, video: Mp4Sink, *, stays: bool = False, saved_blocks: int = 0) -> bool:
        """Move the file of `video`, which is closed, out of the temp folder, and say where it is; False without one.

        Raises nothing of its own: it runs while the error that ended the stream is on its way.

        Args:
            video: of the stream.
            stays: whether the file is in the output folder already, beside what the stream goes on from.
            saved_blocks: behind which it goes on; 0 where nothing was saved.
        """
        if video.frames_written == 0 or not video.path.is_file():
            return False
        made = video.frames_written
        try:
            if stays:
                kept, shown, with_workflow = video.path, host.shown_in_output(video.path), True
            else:
                kept, shown, with_workflow = self._move(video.path)
        except Exception as error:
            # Catches every error: the one that ended the stream is the one to be seen.
            logger.warning("moving %s to the output folder failed", video.path, exc_info=True)
            said = self._progress.say("stopped_in_temp", pictures=made, file=str(video.path), error=str(error))
            logger.warning("%s", said)
            return True
        logger.warning("Stopped; the %d pictures made so far are in %s", made, kept)
        file = f"{shown['subfolder']}/{shown['filename']}"
        if not with_workflow:
            self._progress.say("stopped_without_workflow", pictures=made, file=file)
        elif saved_blocks:
            self._progress.say("stopped_saved", pictures=made, file=file, blocks=saved_blocks)
        else:
            self._progress.say("stopped", pictures=made, file=file)
        self._progress.show_unfinished({**shown, "pictures": made})
        host.list_as_asset(kept)
        return True

    def _move(self, source: Path) -> tuple[Path, dict[str, str], bool]:
        metadata = host.workflow_metadata(self._prompt, self._extra)
        target, shown = host.reserve_output_file(UNFINISHED, ".mp4")
        return target, shown, move_unfinished(source, target, metadata)
