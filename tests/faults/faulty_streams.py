"""Streams of a small model for faults to strike: every stage runs in one of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

import torch
from file_streams import Pictures

from streamblocks.stream.direction import Direction
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.residency import PlainResidency
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.saved_stream import SavedStream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameSink
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.stream_report import StreamReport
from streamblocks.stream.stream_saver import StreamSaver
from streamblocks.stream.video_input import VideoInput

FPS = Fraction(16)
SETTINGS = StreamSettings(width=32, height=32, blocks=3, steps=1, seed=7)


class RoomyCard(PlainResidency):
    """A device whose memory is counted, and enough."""

    def available_bytes(self, device: torch.device) -> int:
        return 10**12


def _images(count: int) -> torch.Tensor:
    return torch.rand((count, 32, 32, 3), generator=torch.Generator().manual_seed(3))


def of_prompts(**others: Any) -> Direction:
    """Another prompt for each block."""
    return Direction(lambda index: f"a cat {index}", **others)


# By name: settings, and what directs the stream.
STREAMS: dict[str, Callable[[], tuple[StreamSettings, Direction]]] = {
    "recompute": lambda: (SETTINGS, of_prompts()),
    "rolling": lambda: (replace(SETTINGS, kv_policy="rolling", context_frames=3, sink_frames=1, steps=2), of_prompts()),
    "fused": lambda: (
        replace(SETTINGS, kv_policy="rolling", context_frames=3, fuse_context=True),
        Direction.constant("a cat"),
    ),
    "video": lambda: (SETTINGS, of_prompts(video=VideoInput(PictureBatch("video", _images(33), FPS), FPS, 0.5))),
    "start": lambda: (SETTINGS, of_prompts(start=StartPictures(PictureBatch("start", _images(5)), FPS))),
}


@dataclass
class Watcher:
    """Calls something after each block."""

    after: Callable[[int], None] = lambda _: None

    def while_loading(self, component: str, done: int, total: int) -> None: ...

    def before_pass(self, index: int) -> None: ...

    def after_block(self, block: Any) -> None:
        self.after(block.index)


@dataclass
class Made:
    """What a stream came to."""

    report: StreamReport | None = None
    frames: torch.Tensor | None = None
    error: BaseException | None = None
    rungs: list[tuple[int, str, str]] = field(default_factory=list)


def make(
    pipeline: Any,
    name: str,
    watcher: Watcher | None = None,
    sink: FrameSink | None = None,
    *,
    saver: StreamSaver | None = None,
    saved: SavedStream | None = None,
    **changes: Any,
) -> Made:
    """Run a stream to its end, good or bad; the pictures are those that reached a sink.

    With `saved` it is the rest of that stream, with the settings that its memory left.
    """
    settings, direction = STREAMS[name]()
    if saved is not None:
        direction = replace(direction, go_on=saved.snapshot)
        changes["decode_bands"] = saved.snapshot.settings.decode_bands
        changes["decoder_cache_in_ram"] = saved.snapshot.settings.decoder_cache_in_ram
    made = Made()

    def tell(block: int, stage: str, rung: str) -> None:
        made.rungs.append((block, stage, rung))

    pictures = Pictures()
    try:
        made.report = run_stream(
            pipeline,
            replace(settings, **changes),
            direction,
            [pictures] if sink is None else [pictures, sink],
            watcher or Watcher(),
            on_rung=tell,
            saver=saver,
            resume=None if saved is None else saved.point,
        )
    except BaseException as error:
        made.error = error
    made.frames = torch.cat(pictures.blocks) if pictures.blocks else None
    return made


# Of each stage, a stream in which it runs, and the pictures before it where it fails in block 2; 0 where it runs once.
FAILS_ONCE = [
    ("recompute", "text_encoder", 9),
    ("recompute", "refill_context", 9),
    ("rolling", "denoise_block", 9),
    ("rolling", "decode", 9),
    ("fused", "decode", 9),
    ("video", "encode_input", 9),
    ("start", "start pictures", 0),
]
STAYS_SHORT = [
    ("recompute", "prepare_caches", 9),
    ("recompute", "pictures", 9),
    ("rolling", "decode", 9),
    ("rolling", "remember_block", 9),
    ("start", "loading", 0),
]
CANCELLED = [
    ("recompute", "text_encoder", 9),
    ("recompute", "decode", 9),
    ("start", "start pictures", 0),
]
