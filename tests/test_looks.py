"""A cancel is looked for often while a block is made on a CPU, and ends the stream wherever it is seen."""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
from torch import nn

from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.stream.direction import Direction
from streamblocks.stream.looks import look_away, looking
from streamblocks.stream.materialise import materialise
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.start_pictures import StartPictures

from foreign_repository import write_foreign_repository

pytestmark = pytest.mark.usefixtures("no_pipeline")
SETTINGS = StreamSettings(width=32, height=32, steps=2, blocks=3, context_frames=3)
PASSES, FRAMES = 2, 3


class Cancelled(BaseException):
    """As ComfyUI's own: not an `Exception`."""


class Looks:
    """Counts looks, and blocks between them; raises in the look of the given number."""

    def __init__(self, stop_at=None):
        self.stop_at, self.seen, self.at_blocks, self.pictures = stop_at, 0, [], []

    def look(self):
        self.seen += 1
        if self.seen == self.stop_at:
            raise Cancelled

    def while_loading(self, component, done, total):
        pass

    def before_pass(self, index):
        pass

    def after_block(self, block):
        self.at_blocks.append(self.seen)
        self.pictures.append(block.frames)

    def stream(self, pipeline, direction=None, **changes):
        direction = direction or Direction.constant("a cat")
        run_stream(pipeline, SETTINGS, direction, [], self, on_look=self.look, **changes)
        return self


@pytest.fixture(params=["built in", "foreign"])
def pipeline(request, tmp_path, tiny_folder, remote_code_allowed):
    if request.param == "built in":
        return materialise(Recipe(model=str(tiny_folder)))
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    return materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))


def hooks_of(pipeline):
    parts = [part for part in pipeline.pipe.components.values() if isinstance(part, nn.Module)]
    return sum(len(module._forward_pre_hooks) for part in parts for module in part.modules())


def test_every_layer_pass_and_frame_is_looked_at_and_any_look_may_end_it(pipeline):
    whole = Looks().stream(pipeline)
    layers, encoder = len(pipeline.pipe.transformer.blocks), pipeline.pipe.text_encoder.encoder
    between = [after - before for before, after in pairwise(whole.at_blocks)]
    # One more pass for the context, and several convolutions for each frame.
    assert min(between) >= layers * (PASSES + 1) + FRAMES * 5
    # The prompt was encoded in the first block only.
    assert whole.at_blocks[0] > len(encoder.block)
    assert hooks_of(pipeline) == 0 and pipeline.on_look is look_away
    memory = live_tensor_bytes() - sum(frames.nbytes for frames in whole.pictures)
    first, last = whole.at_blocks[0], whole.at_blocks[1]
    for stop_at in (1, 2, first // 2, first, first + 1, (first + last) // 2, last):
        stopped = Looks(stop_at)
        with pytest.raises(Cancelled) as kept:
            stopped.stream(pipeline)
        assert stopped.seen == stop_at and len(stopped.pictures) == (stop_at > first)
        assert hooks_of(pipeline) == 0 and pipeline.on_look is look_away
        held = sum(frames.nbytes for frames in whole.pictures + stopped.pictures)
        assert live_tensor_bytes() == memory + held, kept
    again = Looks().stream(pipeline)
    assert all(map(torch.equal, again.pictures, whole.pictures))


def test_encoding_given_pictures_is_looked_at(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    plain = Looks().stream(pipeline)
    start = StartPictures(PictureBatch("start", torch.rand((9, 32, 32, 3))), Fraction(16))
    given = Direction(lambda _: "a cat", start=start)
    started = Looks().stream(pipeline, given)
    assert started.at_blocks[0] - plain.at_blocks[0] >= 3 * len(pipeline.pipe.vae.encoder.down_blocks)


def test_compiled_modules_and_other_devices_are_left_alone():
    looks = Looks()
    inner, plain = nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 2)
    model = nn.Sequential(nn.ModuleList([inner, plain]))
    inner._compiled_call_impl = inner.forward
    with looking(looks.look, [model, None], torch.device("cpu")):
        inner(torch.ones(2))
        assert looks.seen == 0
        plain(torch.ones(2))
        assert looks.seen == 1
    for look, device in ((looks.look, "meta"), (look_away, "cpu")):
        with looking(look, [model], torch.device(device)):
            assert not plain._forward_pre_hooks
