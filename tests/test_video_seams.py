"""Where a stream's input video meets what else directs it: a cut, a start, an earlier stream, a block that fails."""

from fractions import Fraction

import pytest
import torch
from file_streams import Nobody

from streamblocks.stream import session as session_room
from streamblocks.stream.direction import Direction
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.materialise import materialise
from streamblocks.stream.picture_sources import PictureBatch, VideoFile
from streamblocks.stream.prompt_track import PromptTrack
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import BlockFailedError, Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.sinks import FrameKeeper
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.video_input import VideoInput

from drawn_videos import write_video

FPS = Fraction(16)


@pytest.fixture(scope="module")
def pipeline(tiny_folder):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamblocks.wan.rehearsal.rehearse_streaming_bytes", lambda *_: 0)
        yield materialise(Recipe(model=str(tiny_folder)))


@pytest.fixture(scope="module")
def images():
    return torch.rand((60, 32, 32, 3), generator=torch.Generator().manual_seed(3))


def video_of(images, strength=0.0, at_end="loop", fps=FPS, rate=FPS):
    return VideoInput(PictureBatch("video", images, rate), fps, strength, at_end=at_end)


def stream(pipeline, blocks, *, track="0: a cat", **direction):
    keeper = FrameKeeper(KeepFrames.ALL)
    settings = StreamSettings(width=32, height=32, steps=1, seed=7, blocks=blocks)
    placed = PromptTrack.parse(track).place(blocks, None)
    given = Direction.of("", track=placed, **direction)
    return run_stream(pipeline, settings, given, [keeper], Nobody(), keep_stream=True), keeper.frames()


def test_a_video_that_was_all_taken_is_said(pipeline, images, monkeypatch):
    report, _ = stream(pipeline, 2, video=video_of(images[:21], at_end="stop"))
    monkeypatch.setattr(Session, "run_block", lambda *_: pytest.fail("a block was made"))
    with pytest.raises(ValueError, match=r"^video has ended: the stream of go_on_from took all of its pictures \(21\)"):
        stream(pipeline, 2, go_on=report.snapshot, video=video_of(images[:21], at_end="stop"))


def test_another_video_of_the_same_size_and_length_begins_at_its_beginning(pipeline, images):
    report, _ = stream(pipeline, 1, video=video_of(images[:30]))
    _, made = stream(pipeline, 1, go_on=report.snapshot, video=video_of(images[30:]))
    _, expected = stream(pipeline, 1, go_on=report.snapshot, video=video_of(images[30:42]))
    assert torch.equal(made, expected)


def test_at_another_rate_the_same_seconds_are_left_out(pipeline, images):
    report, _ = stream(pipeline, 1, video=video_of(images))
    _, made = stream(pipeline, 1, go_on=report.snapshot, video=video_of(images, fps=2 * FPS))
    # 9 pictures at 16 a second are 18 at 32; each picture is shown twice.
    _, expected = stream(pipeline, 1, go_on=report.snapshot, video=video_of(images[9:], fps=2 * FPS))
    assert torch.equal(made, expected)


def test_a_part_of_a_file_or_a_replaced_file_is_another_video(tmp_path):
    path = write_video(tmp_path / "a.mp4", 4)
    known = {VideoFile("video", str(path), begin).identity() for begin in (0.0, 0.1)}
    assert VideoFile("start", str(path)).identity() in known
    write_video(path, 6)
    assert VideoFile("video", str(path)).identity() not in known and len(known) == 2


def test_a_video_that_is_gone_at_the_end_costs_no_stream(pipeline, tmp_path, monkeypatch):
    path = write_video(tmp_path / "a.mp4")
    monkeypatch.setattr(Nobody, "after_block", lambda *_: path.unlink())
    video = VideoInput(VideoFile("video", str(path)), FPS, 0.5)
    report, made = stream(pipeline, 1, video=video)
    assert len(made) == 9 and report.snapshot.input_video.pictures == 9


def test_a_file_that_is_damaged_further_on_can_be_gone_on_from(images):
    class Damaged(PictureBatch):
        def pictures(self):
            yield from super().pictures()
            raise ValueError("video 'a.mp4' cannot be read as a video.")

    reader = VideoInput(Damaged("video", images[:10], FPS), FPS, 0.5).open(32, 32)
    reader.skip(9)
    pictures = reader.next(12)
    assert pictures is not None and len(pictures) == 12
    assert "What comes before was used as the whole video." in reader.notices()[0]


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_a_cut_at_the_first_block_leaves_a_start_as_it_is(pipeline, images, strength):
    start = StartPictures(PictureBatch("start", images[:1]), FPS)
    _, cut = stream(pipeline, 1, track="0 cut: a cat", start=start, video=video_of(images, strength))
    _, plain = stream(pipeline, 1, start=start, video=video_of(images, strength))
    assert len(cut) == 13 and torch.equal(cut, plain)


def test_pictures_of_a_block_that_failed_are_not_counted(pipeline, images, monkeypatch):
    """Otherwise the video's sound would be said to begin before the file."""

    def check(state, block, explain):
        if block == 1:
            raise BlockFailedError("block 1 is bad")

    monkeypatch.setattr(session_room, "check_finite", check)
    report, made = stream(pipeline, 3, video=video_of(images))
    assert report.video.pictures == report.pictures == len(made) == 9


def test_blocks_that_are_their_input_leave_the_keys_of_a_deferred_one(pipeline, images):
    """The pass of the block before is fused with the first step, and strength 0 has none."""
    made = []
    for fuse in (False, True):
        settings = StreamSettings(
            width=32, height=32, steps=2, kv_policy="rolling", context_frames=6, fuse_context=fuse, video_given=True
        )
        with Session(pipeline, settings) as session:
            pictures = (images[:57] * 255).to(torch.uint8).split([9, 12, 12, 12, 12])
            strengths = [0.6, 0.6, 0.0, 0.6, 0.6]
            blocks = [
                session.run_block("a cat", {"input_pictures": one, "strength": strength}).frames
                for one, strength in zip(pictures, strengths, strict=True)
            ]
        made.append(torch.cat(blocks).int())
    # Fused passes round otherwise; missing keys change pictures by 16 and more.
    assert (made[0] - made[1]).abs().max() <= 2
