"""The pack as ComfyUI sees it."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .. import host
from .convert import ConvertCheckpoint
from .live_input import StreamLiveInput
from .loader import LoadStreamingPipeline
from .lora import StreamLora
from .memory_nodes import FreeStreamMemory, StreamMemoryReport
from .prompt_track import StreamPromptThen, StreamPromptTrack
from .quantize import QuantizePipeline, SaveQuantizedModel
from .save_stream import SaveStream
from .saved_streams import LoadSavedStream, SaveStreamState
from .stream_sampler import StreamingBlockSampler


class StreamBlocksExtension(ComfyExtension):
    """All nodes of the pack."""

    async def on_load(self) -> None:
        """Add the routes for pages; ComfyUI calls this before its server starts."""
        host.register_routes()

    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """The node classes."""
        return [
            LoadStreamingPipeline,
            StreamLora,
            QuantizePipeline,
            StreamPromptTrack,
            StreamPromptThen,
            StreamLiveInput,
            StreamingBlockSampler,
            SaveStream,
            LoadSavedStream,
            SaveStreamState,
            SaveQuantizedModel,
            ConvertCheckpoint,
            StreamMemoryReport,
            FreeStreamMemory,
        ]
