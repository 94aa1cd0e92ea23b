"""Load Saved Stream and Save Stream State: streams that outlast ComfyUI's process."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .. import host
from ..stream.prompt_track import PromptTrack
from ..stream.saved_names import names_at_rest, newest_written
from .found_by import search_aliases
from .prompt_track import TrackType
from .stream_socket import StreamType

if TYPE_CHECKING:
    from ..stream.run_point import RunPoint
    from ..stream.snapshot import StreamSnapshot

# In ComfyUI's output folder.
PLACE = "streamblocks"
UNFINISHED, SAVED = KINDS = ("unfinished", "saved")
NONE_YET = "(no stream was saved yet)"


class LoadSavedStream(io.ComfyNode):
    """Reads a stream from the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksLoadStream",
            display_name="Load Saved Stream",
            category="StreamBlocks",
            **search_aliases("resume", "continue stream", "unfinished", "crash"),
            description=(
                "Gives a stream that was saved while it ran, or by Save Stream State, for a sampler to go on from. To "
                "make an unfinished stream whole with the workflow that began it, use the sampler's own 'resume'."
            ),
            inputs=[
                io.Combo.Input(
                    "stream",
                    options=_choices(),
                    tooltip=(
                        "Unfinished streams, then saved ones, the newest first: folders of streamblocks in the output "
                        "folder. Of an unfinished one it is the last save; one that runs now is not listed."
                    ),
                ),
            ],
            outputs=[
                StreamType.Output(display_name="stream", tooltip="For go_on_from of a sampler."),
                TrackType.Output(
                    display_name="track",
                    tooltip="The prompts of an unfinished stream, from its first block on, with what was changed.",
                ),
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, stream: str) -> float:
        """Changes with the newest save."""
        return newest_written(_folder(stream))

    @classmethod
    def execute(cls, stream: str) -> io.NodeOutput:
        """Read it."""
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.saved_folder import SavedFolder

        saved, _ = SavedFolder(_folder(stream)).load()
        return io.NodeOutput(_with_video(saved.snapshot, saved.point), _track(saved.point))


class SaveStreamState(io.ComfyNode):
    """Writes a stream to the output folder."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksSaveStreamState",
            display_name="Save Stream State",
            category="StreamBlocks",
            **search_aliases("save snapshot", "checkpoint stream", "continue later"),
            description=(
                "Writes what a sampler needs to go on with a stream to the output folder's streamblocks/saved, for "
                "Load Saved Stream on another day. The video itself is not in it."
            ),
            inputs=[
                StreamType.Input("stream", tooltip="The stream output of a sampler."),
                io.String.Input(
                    "name", default="stream", tooltip="Name of the folder; a number and, if you like, %date% follow."
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where it is.")],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, stream: StreamSnapshot, name: str) -> io.NodeOutput:
        """Write it."""
        from ..stream.saved_folder import SavedFolder
        from ..stream.saved_stream import SavedStream

        path, _ = host.new_output_file(f"{PLACE}/{SAVED}/{name}", "", width=0, height=0)
        SavedFolder(path).save(SavedStream(stream.lean(), None))
        return io.NodeOutput(str(path))


def _choices() -> list[str]:
    root = host.output_folder() / PLACE
    return [f"{kind}/{name}" for kind in KINDS for name in names_at_rest(root / kind)] or [NONE_YET]


def _folder(stream: str) -> Path:
    """The folder behind a choice; raises ValueError for what is not listed, such as a name that leads elsewhere."""
    if stream == NONE_YET or stream not in _choices():
        raise ValueError(
            f"stream {stream!r} is not in the output folder's streamblocks: refresh the page (key R) and choose again."
        )
    return host.output_folder() / PLACE / stream


def _with_video(snapshot: StreamSnapshot, point: RunPoint | None) -> StreamSnapshot:
    """The snapshot with a video of its own length: the file may have grown after the save."""
    video = snapshot.video
    if video is None or point is None or not video.path.is_file():
        return snapshot
    cut = host.new_temp_file("streamblocks", ".mp4")
    with video.path.open("rb") as source, cut.open("wb") as target:
        left = point.video.bytes
        while left and (piece := source.read(min(left, 1 << 22))):
            target.write(piece)
            left -= len(piece)
    return snapshot.with_video(cut, video.fps, video.pictures)


def _track(point: RunPoint | None) -> Any:  # noqa: ANN401
    if point is None or not point.track:
        return host.blocked_output(
            "There is no track: the stream was saved at its end, or a conditioning was its prompt."
        )
    return PromptTrack.parse(point.track, point.interpolation)
