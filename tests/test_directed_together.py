"""Tracks, pictures and streams that go on, together: a cut stream with a video or a start is the one that was uncut."""

from fractions import Fraction

import pytest
import torch
from file_streams import Nobody

from streamblocks.stream.direction import Direction
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.picture_sources import PictureBatch
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.video_input import VideoInput

FPS = Fraction(16)
POLICIES = ("recompute", "rolling")


@pytest.fixture(scope="module")
def images():
    return torch.rand((57, 32, 32, 3), generator=torch.Generator().manual_seed(3))


def video_of(images, strength=0.5):
    return VideoInput(PictureBatch("video", images, FPS), FPS, strength)


def stream(pipeline, policy, blocks, *, track="0: a cat", **direction):
    keeper = FrameKeeper(KeepFrames.ALL)
    settings = StreamSettings(width=32, height=32, steps=1, seed=7, blocks=blocks, kv_policy=policy)
    placed = PromptTrack.parse(track, "linear").place(blocks, None)
    report = run_stream(
        pipeline, settings, Direction.of("", track=placed, **direction), [keeper], Nobody(), keep_stream=True
    )
    return report, keeper.frames()


@pytest.mark.parametrize("given", ["start", "video", "start and video"])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_stream_with_pictures_goes_on_as_if_it_were_uncut(pipeline, images, policy, given):
    """4 blocks are 2 and 2, twice from the same snapshot; the video goes on where it was."""
    start = {"start": StartPictures(PictureBatch("start", images[:5]), FPS)} if "start" in given else {}
    video = {"video": video_of(images[5:])} if "video" in given else {}
    _, uncut = stream(pipeline, policy, 4, **start, **video)
    report, before = stream(pipeline, policy, 2, **start, **video)
    for _ in range(2):
        _, after = stream(pipeline, policy, 2, go_on=report.snapshot, **video)
        assert torch.equal(torch.cat([before, after]), uncut)


def test_another_video_begins_at_its_beginning(pipeline, images):
    report, _ = stream(pipeline, "recompute", 1, video=video_of(images))
    assert report.snapshot.input_video.pictures == 9
    _, same = stream(pipeline, "recompute", 1, go_on=report.snapshot, video=video_of(images))
    _, other = stream(pipeline, "recompute", 1, go_on=report.snapshot, video=video_of(images[9:21]))
    assert torch.equal(same, other)


def test_a_video_may_come_to_a_stream_that_had_none(pipeline, images):
    """What was shown last is the past of the video, too; and a stream may go on without its video."""
    plain, _ = stream(pipeline, "recompute", 1)
    report, made = stream(pipeline, "recompute", 2, go_on=plain.snapshot, video=video_of(images, 0.0))
    assert len(made) == report.video.pictures == 24
    _, other = stream(pipeline, "recompute", 2, go_on=plain.snapshot, video=video_of(images.flip(0), 0.0))
    assert not torch.equal(made, other)
    _, without = stream(pipeline, "recompute", 1, go_on=report.snapshot)
    _, further = stream(pipeline, "recompute", 1, go_on=report.snapshot, video=video_of(images, 0.0))
    assert len(without) == len(further) == 12 and not torch.equal(without, further)


@pytest.mark.parametrize("policy", POLICIES)
def test_behind_a_cut_a_video_goes_on_with_its_next_picture(pipeline, images, policy):
    report, made = stream(pipeline, policy, 3, track="0: a cat\n2 cut: a dog", video=video_of(images, 0.0))
    assert report.video.pictures == len(made) == 9 + 12 + 9
    _, alone = stream(pipeline, policy, 1, track="0: a dog", video=video_of(images[21:], 0.0))
    assert torch.equal(made[21:], alone)
