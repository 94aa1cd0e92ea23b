"""Save Stream: the finished video goes to the output folder, without re-encoding where an mp4 can hold it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from comfy_api.latest import io

from .. import host
from .found_by import search_aliases


class SaveStream(io.ComfyNode):
    """Puts a stream's video into the output folder, with the workflow inside."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksSaveStream",
            display_name="Save Stream",
            category="StreamBlocks",
            **search_aliases("save endless video"),
            description=(
                "Saves the video to the output folder as it is, without re-encoding, with the workflow embedded: "
                "drop the file on ComfyUI's page to get the graph back. A video that an mp4 cannot hold, or a trimmed "
                "one, is encoded again."
            ),
            inputs=[
                io.Video.Input("video", tooltip="From the Streaming Block Sampler, or any other."),
                io.String.Input(
                    "filename_prefix",
                    default="video/stream",
                    tooltip="Name of the file, with sub-folders; %date:yyyy-MM-dd_hh-mm% and %width% work.",
                ),
            ],
            outputs=[
                io.Video.Output(display_name="video", tooltip="The saved video, for nodes that follow."),
                io.String.Output(display_name="path", tooltip="Where the file is."),
            ],
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo, io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, video: Any, filename_prefix: str) -> io.NodeOutput:  # noqa: ANN401
        """Save it."""
        # Imported here: only saving a video needs PyAV.
        from ..stream.save_video import can_copy, encode_video, save_video
        from .connected_pictures import sound_of, source_of

        hidden = cls.hidden
        metadata = {} if hidden is None else host.workflow_metadata(hidden.prompt, hidden.extra_pnginfo)

        def new_file(width: int, height: int) -> tuple[Path, dict[str, str]]:
            return host.new_output_file(filename_prefix, ".mp4", width=width, height=height)

        given = host.look_into_video(video)
        file = Path(given.file) if isinstance(given.file, str) else given.file
        if file is not None and not host.is_trimmed(video) and can_copy(file):
            path, shown = save_video(file, new_file, metadata)
        else:
            source = source_of("video", video)
            path, shown, notice = encode_video(
                source, sound_of(video, source), new_file, metadata, host.throw_if_cancelled
            )
            if notice is not None:
                host.StreamProgress(1, hidden).say("saved_without_sound", notice=notice)
        return io.NodeOutput(host.video_from_file(path), str(path), ui={"images": [shown], "animated": (True,)})
