"""Pictures from outside: their size, their rate, their end, and what is refused."""

import io
from fractions import Fraction
from itertools import pairwise

import av
import numpy as np
import pytest
import torch

from streamblocks.stream.fit_pictures import PictureFit, to_rgb
from streamblocks.stream.picture_sources import PictureBatch, Resampled, ShownPicture, VideoFile
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.sound_track import FileSound, SoundBatch, SoundPlan, add_sound
from streamblocks.stream.start_pictures import StartPictures
from streamblocks.stream.video_input import VideoInput

from drawn_videos import SAMPLE_RATE, TONE, draw_pictures, numbers_of, write_video

FPS = Fraction(12)


def images(count, width=48, height=32):
    return torch.from_numpy(draw_pictures(count, width, height)).float() / 255.0


def video(source, at_end="loop", fps=FPS, fit="crop", strength=0.5):
    return VideoInput(source, fps, strength, fit, at_end)


def half_and_half(width, height):
    """Left half white, right half black; the top row red."""
    picture = torch.zeros(height, width, 3)
    picture[:, : width // 2] = 1.0
    picture[0] = torch.tensor([1.0, 0.0, 0.0])
    return picture


def test_a_wide_picture_loses_its_sides_or_gets_bars():
    wide = half_and_half(96, 32)
    cropped = PictureFit(32, 32, "crop").apply(wide)
    # The middle third, as it is: nothing had to be scaled.
    assert torch.equal(cropped, to_rgb(wide)[:, 32:64])
    padded = PictureFit(48, 32, "pad").apply(wide)
    assert not padded[:8].any() and not padded[24:].any()
    assert (padded[16, :20] > 240).all() and (padded[16, 28:] < 15).all()
    assert "cropped at left and right to 32x32" in PictureFit(32, 32).describe("video", 32, 96)
    assert "padded with black at top and bottom to 48x32" in PictureFit(48, 32, "pad").describe("video", 32, 96)
    assert PictureFit(48, 32).describe("video", 64, 96) == "video: pictures of 96x64 are scaled to 48x32."
    assert PictureFit(48, 32).describe("video", 32, 48) == ""


@pytest.mark.parametrize("size", [(1, 4000), (4000, 1), (1, 1), (47, 31)])
@pytest.mark.parametrize("fit", ["crop", "pad"])
def test_any_size_becomes_the_streams(size, fit):
    fitted = PictureFit(48, 32, fit).apply(torch.ones(size[1], size[0], 3))
    assert fitted.shape == (32, 48, 3) and fitted.dtype is torch.uint8 and (fitted.max() == 255)


def test_grey_is_repeated_and_what_is_transparent_is_black():
    grey = to_rgb(torch.full((2, 2, 1), 0.5))
    assert grey.shape == (2, 2, 3) and (grey == 128).all()
    clear = torch.ones(2, 2, 4)
    clear[0, 0, 3] = 0.0
    assert to_rgb(clear)[0, 0].tolist() == [0, 0, 0] and to_rgb(clear)[1, 1].tolist() == [255] * 3
    assert (to_rgb(torch.full((1, 1, 3), 7.5)) == 255).all()


@pytest.mark.parametrize(
    ("pictures", "sentence"),
    [
        (torch.zeros(0, 8, 8, 3), "start holds no pictures"),
        (torch.zeros(8, 8, 3), "start has shape [8, 8, 3]"),
        (torch.zeros(1, 8, 8, 2), "start has shape [1, 8, 8, 2]"),
        (torch.zeros(1, 0, 8, 3), "start has shape [1, 0, 8, 3]"),
        (torch.full((1, 8, 8, 3), torch.nan), "start holds NaN or infinite values"),
        (torch.zeros(1, 8, 8, 3, dtype=torch.uint8), "start holds torch.uint8"),
        ("a path", "start holds str"),
    ],
)
def test_pictures_that_are_none_are_one_sentence(pictures, sentence):
    with pytest.raises(ValueError) as raised:
        PictureBatch("start", pictures).facts()
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_that_is_none_is_one_sentence(strength):
    with pytest.raises(ValueError, match=r"^strength is .*: choose 0 "):
        video(PictureBatch("video", images(2), FPS), strength=strength)


def test_a_file_that_is_no_video_is_one_sentence(tmp_path):
    (tmp_path / "text.mp4").write_text("no video")
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        track = container.add_stream("aac", rate=SAMPLE_RATE, layout="mono")
        container.mux(track.encode(None))
    broken = write_video(tmp_path / "broken.mp4")
    broken.write_bytes(broken.read_bytes()[:500])
    for name in ("text.mp4", "gone.mp4", "sound.mp4", "broken.mp4"):
        with pytest.raises(ValueError) as raised:
            VideoFile("video", str(tmp_path / name)).facts()
        assert f"video '{name}' " in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("rate", "expected", "dropped", "repeated"),
    [
        (12, [0, 1, 2, 3, 4, 5], 0, 0),
        (24, [0, 2, 4], 3, 0),
        (18, [0, 2, 3, 5], 2, 0),
        (6, [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5], 0, 6),
        (5, [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 5, 5], 0, 8),
    ],
)
def test_pictures_are_dropped_or_repeated_to_the_streams_rate(rate, expected, dropped, repeated):
    source = PictureBatch("video", images(6), Fraction(rate))
    made = Resampled(source.pictures(), FPS)
    assert numbers_of(torch.stack([to_rgb(picture) for picture in made])) == expected
    assert (made.dropped, made.repeated) == (dropped, repeated)


def test_times_decide_not_counts():
    """As of a phone's variable rate: pictures at 0, 80, 500 ms; at 12 a second the middle one is shown for 5 ticks."""
    moments = [Fraction(0), Fraction(80, 1000), Fraction(500, 1000), Fraction(583, 1000)]
    shown = [ShownPicture(begin, end, torch.tensor(index)) for index, (begin, end) in enumerate(pairwise(moments))]
    assert [int(picture) for picture in Resampled(iter(shown), FPS)] == [0, 1, 1, 1, 1, 1, 2]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("plain.mp4", {}),
        ("ten_bits.mp4", {"pixels": "yuv420p10le"}),
        ("lossless_ten_bits.mkv", {"codec": "ffv1", "pixels": "yuv444p10le"}),
        ("alpha.mov", {"codec": "qtrle", "pixels": "argb"}),
    ],
)
def test_files_are_read_picture_by_picture(tmp_path, name, options):
    source = VideoFile("video", str(write_video(tmp_path / name, **options)))
    assert source.facts().rate == 12
    reader = video(source, "stop").open(48, 32)
    parts = [reader.next(count) for count in (9, 12, 12)]
    assert parts[2] is None and parts[0] is not None and parts[1] is not None
    assert numbers_of(parts[0]) == list(range(9))
    # The block in which it ends is filled up.
    assert numbers_of(parts[1]) == [9, 10, *[11] * 10]
    assert "it ended after 12 pictures (1 s); the stream stopped there" in reader.notices()[-1]
    drawn = torch.from_numpy(draw_pictures(9)).float()
    assert (parts[0].float() - drawn).abs().mean() < 4


def test_a_file_that_is_damaged_further_on_ends_there():
    """Losing a running stream would cost more."""

    class Damaged(PictureBatch):
        def pictures(self):
            yield from super().pictures()
            raise ValueError("video 'damaged.mp4' cannot be read as a video (invalid data): give another.")

    reader = video(Damaged("video", images(11), FPS), "hold").open(48, 32)
    assert numbers_of(reader.next(9)) == list(range(9))
    # A picture is held back until the next one's time is known.
    assert numbers_of(reader.next(12)) == [9] * 12
    assert reader.notices()[0].endswith("give another. What comes before was used as the whole video.")


def test_a_files_own_times_are_used(tmp_path):
    path = write_video(tmp_path / "variable.mkv", 4, times=[0, 80, 500, 583])
    reader = video(VideoFile("video", str(path))).open(48, 32)
    assert numbers_of(reader.next(7)) == [0, 1, 1, 1, 1, 1, 2]


def test_a_part_of_a_file_and_a_file_in_memory(tmp_path):
    content = io.BytesIO(write_video(tmp_path / "long.mp4", 24).read_bytes())
    source = VideoFile("video", content, begin=0.5, duration=0.5)
    reader = video(source).open(48, 32)
    assert numbers_of(reader.next(9)) == [6, 7, 8, 9, 10, 11, 6, 7, 8]
    assert reader.use().length == 6 and reader.use().rounds == 1


def test_the_ends_of_a_video():
    source = PictureBatch("video", images(4), FPS)
    looped, held = video(source, "loop").open(48, 32), video(source, "hold").open(48, 32)
    assert numbers_of(looped.next(9)) == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert numbers_of(looped.next(4)) == [1, 2, 3, 0]
    assert numbers_of(held.next(9)) == [0, 1, 2, 3, 3, 3, 3, 3, 3] and numbers_of(held.next(2)) == [3, 3]
    assert held.use().held == 7 and looped.use().rounds == 3
    # One picture is a video, too.
    one = video(PictureBatch("video", images(1), FPS)).open(48, 32)
    assert numbers_of(one.next(9)) == [0] * 9


def test_pictures_that_are_skipped_are_not_scaled(monkeypatch):
    fitted, apply = [], PictureFit.apply

    def count(fit, picture):
        fitted.append(picture)
        return apply(fit, picture)

    monkeypatch.setattr(PictureFit, "apply", count)
    reader = video(PictureBatch("video", images(5), FPS), "hold").open(32, 32)
    reader.skip(6)
    # The last picture is held, and fitted once.
    assert len(reader.next(3)) == 3 and len(fitted) == 1 and reader.use().held == 3


def test_a_stream_goes_on_from_the_end_of_a_file(tmp_path):
    path = write_video(tmp_path / "long.mp4", 24)
    given = StartPictures(VideoFile("start", str(path)), FPS).read(48, 32, most=9)
    assert numbers_of(given.pictures) == list(range(15, 24)) and not len(given.shown)
    slow = StartPictures(VideoFile("start", str(path)), FPS / 2).read(48, 32, most=5)
    assert numbers_of(slow.pictures) == [15, 17, 19, 21, 23]
    one = StartPictures(PictureBatch("start", images(1)), FPS).read(48, 32, most=9)
    assert torch.equal(one.shown, one.pictures) and len(one.shown) == 1


def read_sound(path):
    """float [samples] of an mp4's sound, at its own rate."""
    with av.open(str(path)) as container:
        return np.concatenate([frame.to_ndarray()[0] for frame in container.decode(audio=0)])


def loudness(samples):
    """Root mean square of each tenth of a second."""
    parts = samples[: len(samples) // (SAMPLE_RATE // 10) * (SAMPLE_RATE // 10)].reshape(-1, SAMPLE_RATE // 10)
    return np.sqrt((parts**2).mean(1))


@pytest.mark.parametrize("kind", ["file", "batch"])
def test_the_sound_is_delayed_repeated_and_cut(tmp_path, kind):
    made = tmp_path / "stream.mp4"
    sink = Mp4Sink(made, fps=12)
    sink.write(torch.from_numpy(draw_pictures(30)))
    sink.close()
    sound: FileSound | SoundBatch = FileSound(
        VideoFile("video", str(write_video(tmp_path / "input.mp4", 12, sound=True)))
    )
    if kind == "batch":
        tone = torch.sin(2 * torch.pi * TONE * torch.arange(SAMPLE_RATE) / SAMPLE_RATE) / 2
        sound = SoundBatch(tone[None, None], SAMPLE_RATE)
    # Half a second of silence, then a second, then another of which a half is left.
    assert add_sound(made, sound, SoundPlan(Fraction(1, 2), Fraction(2), Fraction(1))) is None
    heard = read_sound(made)
    assert abs(len(heard) / SAMPLE_RATE - 2.0) < 0.06
    loud = loudness(heard)
    assert loud[:4].max() < 0.02 and abs(loud[6:14].mean() - 0.5 / 2**0.5) < 0.02 and loud[16:19].min() > 0.3
    spectrum = np.abs(np.fft.rfft(heard[SAMPLE_RATE // 2 : SAMPLE_RATE]))
    assert abs(spectrum.argmax() * 2 - TONE) <= 2
    with av.open(str(made)) as container:
        assert sum(1 for _ in container.decode(video=0)) == 30


def test_a_video_without_sound_leaves_the_file_alone(tmp_path):
    path = write_video(tmp_path / "silent.mp4")
    before = path.read_bytes()
    assert add_sound(path, FileSound(VideoFile("video", str(path))), SoundPlan(Fraction(0), Fraction(1))) is None
    assert path.read_bytes() == before
    # Pictures are never lost for want of their sound.
    notice = add_sound(
        path, FileSound(VideoFile("video", str(tmp_path / "gone.mp4"))), SoundPlan(Fraction(0), Fraction(1))
    )
    assert notice is not None and "could not be carried over" in notice and path.read_bytes() == before
