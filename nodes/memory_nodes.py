"""Stream Memory Report and Free Stream Memory: see what holds the memory, and free it."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from .. import host
from ..memory import compile_caches
from ..memory.byte_text import format_bytes
from ..memory.cleanup import release_cached_memory
from ..memory.freed import FreedMemory, read_device_memory
from ..memory.growth import judge_growth
from ..memory.timeline import Timeline
from ..memory.timeline_table import write_table

TimelineType = io.Custom("STREAMBLOCKS_TIMELINE")


class StreamMemoryReport(io.ComfyNode):
    """Shows a stream's memory as picture, table and JSON, with a verdict."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksMemoryReport",
            display_name="Stream Memory Report",
            category="StreamBlocks",
            description=(
                "What holds the memory, block by block: a plot, a table and JSON. Reports whether memory is flat or "
                "grows, and if it grows, what grows and what to do."
            ),
            inputs=[
                TimelineType.Input("timeline", tooltip="From the Streaming Block Sampler."),
                io.Int.Input("width", default=960, min=480, max=4096, tooltip="Of the plot, in pixels."),
                io.Int.Input("height", default=640, min=320, max=4096, tooltip="Of the plot, in pixels."),
            ],
            outputs=[
                io.Image.Output(display_name="plot", tooltip="Owners stacked over the blocks, and the peak."),
                io.String.Output(display_name="table", tooltip="The verdict, and a table by stage and by owner."),
                io.String.Output(display_name="json", tooltip="All records; in them, block 0 is the first."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, timeline: Timeline | None, width: int, height: int) -> io.NodeOutput:
        """Judge, plot and write."""
        if timeline is None:
            raise ValueError("timeline was not recorded: set the sampler's memory_timeline to 'on'.")
        # Imported here: only the plot needs Pillow's font code.
        from ..memory.timeline_plot import plot_timeline
        from ..stream.frames import to_image_batch, to_uint8_frames

        verdict = judge_growth(timeline)
        picture = plot_timeline(timeline, verdict.headline, width=width, height=height)
        path = host.new_temp_file("streamblocks_memory", ".png")
        picture.save(path, compress_level=1)
        shown = {"filename": path.name, "subfolder": "", "type": "temp"}
        ui = {"images": [shown], "text": (verdict.sentence,)}
        image = to_image_batch(to_uint8_frames([[picture]]))
        return io.NodeOutput(image, write_table(timeline, verdict), timeline.to_json(indent=1), ui=ui)


class FreeStreamMemory(io.ComfyNode):
    """Passes anything through and frees memory when it runs."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksFreeMemory",
            display_name="Free Stream Memory",
            category="StreamBlocks",
            description=(
                "Frees memory once its input has been computed, and says how much. Like every node, it runs again only "
                "when its input is computed again."
            ),
            inputs=[
                io.AnyType.Input("anything", tooltip="Passed through unchanged; connect it after the sampler."),
                io.Boolean.Input(
                    "drop_pipeline",
                    default=True,
                    tooltip="Unload the stream's pipeline; the next stream loads it again.",
                ),
                io.Boolean.Input(
                    "unload_models",
                    default=False,
                    tooltip="Also unload ComfyUI's own models from the device.",
                ),
                io.Boolean.Input(
                    "clear_compile_caches",
                    default=False,
                    tooltip="Also clear torch.compile's caches; layers are compiled again at their next use.",
                ),
            ],
            outputs=[
                io.AnyType.Output(display_name="anything", tooltip="The input, unchanged."),
                io.String.Output(display_name="freed", tooltip="What was freed, as text."),
            ],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(
        cls,
        anything: Any,  # noqa: ANN401
        drop_pipeline: bool,
        unload_models: bool,
        clear_compile_caches: bool,
    ) -> io.NodeOutput:
        """Free what was chosen."""
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.materialise import materialised_device, release_materialised

        streaming = materialised_device()
        device = streaming or host.default_device()
        before = read_device_memory(device)
        done = ["emptied torch's cache"]
        if drop_pipeline and streaming is not None:
            release_materialised()
            done.append("dropped the pipeline")
        if unload_models:
            host.unload_all_models()
            done.append("unloaded ComfyUI's models")
        if clear_compile_caches:
            done.append(f"cleared {compile_caches.clear_compile_caches().dynamo_entries} compiled variants")
        release_cached_memory(device)
        # A page shows the text of `ui` on few of ComfyUI's own nodes only, so the node says it, too.
        said = _say_freed(host.StreamProgress(1, cls.hidden), before.freed_to(read_device_memory(device)))
        text = f"{said}; {', '.join(done)}."
        return io.NodeOutput(anything, text, ui={"text": (text,)})


def _say_freed(progress: host.StreamProgress, freed: FreedMemory) -> str:
    """Say what was freed on the node; returns the line in English."""
    tensors, left = format_bytes(freed.tensors), format_bytes(freed.left)
    if freed.returned is None:
        return progress.say("freed", tensors=tensors, device=freed.device, left=left)
    returned = format_bytes(freed.returned)
    return progress.say("freed_on_card", tensors=tensors, returned=returned, device=freed.device, left=left)
