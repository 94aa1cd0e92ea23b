"""Save Stream: the finished video goes to the output folder, without re-encoding."""

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
                "drop the file on ComfyUI's page to get the graph back."
            ),
            inputs=[
                io.Video.Input("video", tooltip="From the Streaming Block Sampler, or any mp4 video."),
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
            hidden=[io.Hidden.prompt, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, video: Any, filename_prefix: str) -> io.NodeOutput:  # noqa: ANN401
        """Save it."""
        # Imported here: only saving a video needs PyAV.
        from ..stream.save_video import save_video

        source = video.get_stream_source()
        if not isinstance(source, str):
            raise ValueError("video is held in memory, not in a file: use ComfyUI's own Save Video node for it.")
        if host.is_trimmed(video):
            raise ValueError("video was trimmed, which needs re-encoding: use ComfyUI's own Save Video node for it.")
        hidden = cls.hidden
        metadata = {} if hidden is None else host.workflow_metadata(hidden.prompt, hidden.extra_pnginfo)
        path, shown = save_video(
            Path(source),
            lambda width, height: host.new_output_file(filename_prefix, ".mp4", width=width, height=height),
            metadata,
        )
        return io.NodeOutput(host.video_from_file(path), str(path), ui={"images": [shown], "animated": (True,)})
