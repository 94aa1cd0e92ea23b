"""Stream Live Input: what a page's camera shows, or a video that it plays, as the sampler's pictures."""

from __future__ import annotations

from dataclasses import dataclass

from comfy_api.latest import io

from .found_by import search_aliases

CAMERA, PAGE_VIDEO = "camera", "video file of the page"

LiveType = io.Custom("STREAMBLOCKS_LIVE")


@dataclass(frozen=True)
class LiveSource:
    """Where a stream's pictures come from; the pictures themselves are no part of a workflow.

    Attributes:
        source: what the page shows, "camera" or "video file of the page".
        node: the execution id of the node that shows it; None outside of a prompt.
    """

    source: str
    node: str | None


class StreamLiveInput(io.ComfyNode):
    """Names a camera or a video of the page; web/live_input.js sends the pictures."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksLiveInput",
            display_name="Stream Live Input",
            category="StreamBlocks",
            **search_aliases("webcam", "camera", "live", "realtime", "video to video"),
            description=(
                "Video to video from your camera, or from a video that this page plays: each block is made from the "
                "newest pictures. They go to the server only while a stream runs and you have pressed start."
            ),
            inputs=[
                io.Combo.Input(
                    "source",
                    options=[CAMERA, PAGE_VIDEO],
                    default=CAMERA,
                    tooltip=(
                        "camera: one of this computer's; the browser asks you first, and offers it on https or "
                        "localhost only. video file of the page: one that you choose here and that plays in a loop."
                    ),
                ),
            ],
            outputs=[LiveType.Output(display_name="live", tooltip="For the sampler's live input.")],
            # Of several such nodes, each gives its own sampler pictures.
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(cls, source: str) -> io.NodeOutput:
        """Name the source; the sampler takes the pictures while it runs."""
        return io.NodeOutput(LiveSource(source, None if cls.hidden is None else cls.hidden.unique_id))
