"""A stream that has stopped between two blocks, as a value: another session goes on from it."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from .carried_state import DECODED_LATENTS, DECODER_CACHE
from .recipe import BUILT_IN_BLOCKS, Recipe
from .settings import StreamSettings
from .snapshot_layout import POSITION, tensors_named
from .snapshot_tree import TreeReader, TreeWriter
from .stream_pipeline import StreamPipeline


@dataclass(frozen=True)
class VideoSoFar:
    """The file that a stream has made.

    Attributes:
        path: of the mp4; others may delete it.
        fps: pictures a second.
        pictures: how many it holds.
    """

    path: Path
    fps: float
    pictures: int


@dataclass(frozen=True)
class InputVideo:
    """What a stream has taken of the video it is made from.

    Attributes:
        source: which video, as text; see `PictureSource.identity`.
        pictures: of the stream that were taken from it.
        fps: pictures a second of the stream.
    """

    source: str
    pictures: int
    fps: float


@dataclass(frozen=True, eq=False)
class StreamSnapshot:
    """What a stream needs of its past to go on, between two blocks; immutable, on the CPU, and shared with nobody.

    It consists of tensors by name, numbers and strings. One snapshot may start any number of streams, in any order.

    Attributes:
        recipe: of the pipeline that made the stream.
        settings: of its last block, with what was left to the memory decided.
        blocks_made: blocks since the stream's first frame, over all sessions.
        prompt: of the last block.
        layout: the entries of the state as JSON text, in which tensors are named; see `TreeWriter`.
        tensors: by name; never handed out, and not to be written to.
        video: what the pictures are in; None where nobody wrote them to a file.
        input_video: what the next block would be made from; None without one.
        scene_began: of `blocks_made`, those before the last hard cut; 0 where there was none.
    """

    recipe: Recipe
    settings: StreamSettings
    blocks_made: int
    prompt: str
    layout: str = field(repr=False)
    tensors: Mapping[str, torch.Tensor] = field(repr=False)
    video: VideoSoFar | None = None
    input_video: InputVideo | None = None
    scene_began: int = 0

    @classmethod
    def take(
        cls,
        pipeline: StreamPipeline,
        settings: StreamSettings,
        state: Mapping[str, Any],
        *,
        blocks_made: int,
        prompt: str,
        scene_began: int = 0,
    ) -> StreamSnapshot:
        """Copy what the next block needs of a stream's state; costs one copy to the CPU, and `bytes` of it.

        Args:
            pipeline: of the stream; it says which entries are needed.
            settings: of the stream.
            state: entries between two blocks, `generator` among them.
            blocks_made: see the class.
            prompt: of the last block.
            scene_began: see the class.

        Raises:
            CannotSnapshotError: an entry cannot be copied.
            MemoryError: there is too little RAM for the copies.
        """
        writer = TreeWriter(pipeline.device)
        layout = writer.write(pipeline.carried_state(state, settings))
        tensors = MappingProxyType(writer.tensors)
        return cls(pipeline.recipe, settings, blocks_made, prompt, layout, tensors, scene_began=scene_began)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def position(self) -> int | None:
        """Latent frames before the next block; None where the pipeline does not count them."""
        position: int | None = json.loads(self.layout).get(POSITION)
        return position

    @property
    def keeps_keys(self) -> bool:
        """Whether it holds keys and values, whose number and format are then settled; unknown blocks may."""
        return self.recipe.blocks != BUILT_IN_BLOCKS or "kv_cache" in json.loads(self.layout)

    @property
    def fps(self) -> float | None:
        """Pictures a second of the video so far; None where there is none."""
        return None if self.video is None else self.video.fps

    def with_video(self, path: Path, fps: float, pictures: int) -> StreamSnapshot:
        """The same, and where its pictures are; the tensors are shared between the two."""
        return replace(self, video=VideoSoFar(path, fps, pictures))

    def with_input(self, input_video: InputVideo | None) -> StreamSnapshot:
        """The same, and how far it was in its input video."""
        return replace(self, input_video=input_video)

    def lean(self) -> StreamSnapshot:
        """The same without the decoder's cache, where the latents that it can be made anew of are there."""
        nodes = json.loads(self.layout)
        if not {DECODED_LATENTS, DECODER_CACHE} <= set(nodes):
            return self
        del nodes[DECODER_CACHE]
        used = tensors_named(nodes)
        kept = MappingProxyType({name: tensor for name, tensor in self.tensors.items() if name in used})
        return replace(self, layout=json.dumps(nodes), tensors=kept)

    def start_entries(
        self, pipeline: StreamPipeline, only: Collection[str] | None = None, without: Collection[str] = ()
    ) -> dict[str, Any]:
        """State entries for a session that goes on, made for it alone, on the pipeline's device.

        Args:
            pipeline: of that session.
            only: names of the entries that are wanted; None for all.
            without: names of entries that are not.

        Raises:
            ValueError: they are not of such a pipeline.
        """
        reader = TreeReader(self.tensors, pipeline.device, pipeline.snapshot_kinds())
        return reader.read(self.layout, only, without) | {"next_block_idx": self.blocks_made - self.scene_began}
