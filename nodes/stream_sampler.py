"""Streaming Block Sampler: makes the video, block after block."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import host
from .found_by import search_aliases
from .memory_nodes import TimelineType
from .prompt_track import TrackType
from .sampler_inputs import sampler_inputs
from .sampler_values import SamplerValues
from .savable_formats import check_saved_formats
from .stream_socket import stream_output


class StreamingBlockSampler(io.ComfyNode):
    """Streams a video into a file, at flat memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksSampler",
            display_name="Streaming Block Sampler",
            category="StreamBlocks",
            **search_aliases("self forcing", "krea", "endless", "infinite video", "realtime", "streaming"),
            description=(
                "Makes a video block by block at flat memory, however long it gets. The mp4 grows while it runs; "
                "after a cancel or an error the blocks already made are in the output folder's streamblocks/unfinished."
            ),
            inputs=sampler_inputs(),
            outputs=[
                io.Video.Output(display_name="video", tooltip="The whole video, as a file."),
                io.Image.Output(display_name="images", tooltip="The pictures kept, by keep_frames."),
                io.String.Output(display_name="settings", tooltip="What was applied and measured, as JSON."),
                TimelineType.Output(display_name="timeline", tooltip="For Stream Memory Report."),
                stream_output(),
                TrackType.Output(
                    display_name="track",
                    tooltip=(
                        "What the stream followed, with all that was changed while it ran: connected to 'track' of a "
                        "sampler with as many blocks, it gives the same pictures."
                    ),
                ),
            ],
            # Prompt and workflow go into a video that ends early; ComfyUI leaves them out of its cache key.
            hidden=[io.Hidden.unique_id, io.Hidden.prompt, io.Hidden.extra_pnginfo],
        )

    @classmethod
    def fingerprint_inputs(cls, **given: Any) -> int:  # noqa: ANN401
        """Changes once a stream was edited or stopped: its result is not what its inputs make."""
        node = None if cls.hidden is None else cls.hidden.unique_id
        return 0 if node is None else host.times_changed_by_hand(node)

    @classmethod
    def execute(cls, **given: Any) -> io.NodeOutput:  # noqa: ANN401
        """Stream the video; takes the inputs of the schema by their names, see `SamplerValues`."""
        check_saved_formats(None if cls.hidden is None else cls.hidden.prompt)
        values = SamplerValues(**given)
        # Before anything is downloaded; what the recipe's own family takes is checked once it is known.
        choices = values.check()
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from .stream_run import StreamRun

        return StreamRun(values, choices, cls.hidden).execute()
