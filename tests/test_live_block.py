"""A block that people change or see while it is made: what it costs, and that it can be made again to the bit."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import torch
from file_streams import Nobody
from test_steered_streams import CAT, DOG, place, video_of

from streamblocks.families.kv_policies import RECOMPUTE_KEYS
from streamblocks.stream import pipelines
from streamblocks.stream.direction import Direction
from streamblocks.stream.estimate import MemoryEstimate
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.live_control import Edit, LiveControl
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.steering import Steering

LAYERS, STEPS, PASSES = 2, 3, 4


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelines, "estimate_memory", lambda *_: MemoryEstimate(1, 1, 1, 1, 1))
        yield materialise(Recipe(model=str(tiny_folder)))


@dataclass
class Page(Nobody):
    """Somebody who watches and steers; `asked[block, layer]` is edited before that layer call of the block's first try.

    Attributes:
        calls: of layers, by block, within passes.
        shown: block, place and number of pictures, in the order they came.
        takes: how often a block was told of.
    """

    asked: dict[tuple[int, int], Edit] = field(default_factory=dict)
    most_done: float = 0.75
    is_watched: bool = True
    calls: dict[int, int] = field(default_factory=dict)
    shown: list[tuple[int, int, int]] = field(default_factory=list)
    parts: list[torch.Tensor] = field(default_factory=list)
    told: list[int] = field(default_factory=list)

    def __post_init__(self):
        self.control, self.block = LiveControl(), 0
        self.passes: list[int] = []
        self.steering = Steering(
            self.control, tell=self.tell, show=self.show, is_watched=lambda: self.is_watched, most_done=self.most_done
        )

    def tell(self, index, direction):
        self.told.append(index)
        self.block = index

    def show(self, frames, first, of):
        self.shown.append((self.block, first, of))
        self.parts.append(frames)

    def before_layer(self, *_):
        call = self.calls.get(self.block, 0)
        self.calls[self.block] = call + 1
        edit = self.asked.pop((self.block, call), None)
        if edit is not None:
            self.control.edit(edit)

    def before_pass(self, index):
        self.passes.append(self.block)

    def stream(self, pipeline, blocks=4, policy="recompute", direction=None, **settings):
        keeper = FrameKeeper(KeepFrames.ALL)
        settings = StreamSettings(32, 32, blocks=blocks, steps=STEPS, seed=7, kv_policy=policy, **settings)
        hooks = []

        def before_pass(index):
            self.before_pass(index)
            if not hooks:
                transformer = pipeline.pipe.transformer
                hooks.extend(layer.register_forward_pre_hook(self.before_layer) for layer in transformer.blocks)

        watcher = Nobody()
        watcher.before_pass = before_pass
        try:
            report = run_stream(
                pipeline, settings, direction or Direction.of(CAT), [keeper], watcher, steering=self.steering
            )
        finally:
            for hook in hooks:
                hook.remove()
        return report, keeper.frames()


def test_it():
    pass
