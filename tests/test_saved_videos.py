"""Videos of other kinds, saved: copied where an mp4 holds them, else encoded again; read by PyAV."""

import io
from fractions import Fraction
from pathlib import Path

import av
import pytest
import torch
from test_sinks import decode

from streamblocks.stream.picture_sources import PictureBatch, VideoFile
from streamblocks.stream.save_video import can_copy, encode_video, save_video
from streamblocks.stream.sound_track import FileSound

from drawn_videos import draw_pictures, numbers_of, write_video


def nobody():
    pass


def encoded(folder, source, sound=None):
    path, shown, notice = encode_video(
        source, sound, lambda *size: (folder / "out.mp4", size), {"workflow": "{}"}, nobody
    )
    assert shown == (48, 32) and notice is None
    assert [entry.name for entry in folder.glob("out*")] == ["out.mp4"]
    with av.open(str(path)) as container:
        assert container.metadata["workflow"] == "{}"
        assert container.streams.video[0].codec_context.name == "h264"
        return container.streams.video[0].average_rate, len(container.streams.audio), decode(path)


# File name, codec and pixels of what browsers do not play from an mp4.
OTHERS = [
    ("a.webm", "libvpx-vp9", "yuv420p"),
    ("a.mkv", "mpeg4", "yuv420p"),
    ("a.avi", "mjpeg", "yuvj420p"),
    ("b.mkv", "libx264", "yuv420p"),
]


@pytest.mark.parametrize(("name", "codec", "pixels"), OTHERS, ids=[codec for _, codec, _ in OTHERS])
def test_what_an_mp4_cannot_hold_is_encoded(tmp_path, name, codec, pixels):
    path = write_video(tmp_path / name, 6, codec=codec, pixels=pixels)
    assert not can_copy(path) and not can_copy(io.BytesIO(path.read_bytes()))
    rate, _, pictures = encoded(tmp_path, VideoFile("video", str(path)))
    assert rate == 12 and numbers_of(pictures) == list(range(6))


def test_a_trimmed_video_keeps_its_part_and_its_sound(tmp_path):
    path = write_video(tmp_path / "a.mp4", 12, sound=True)
    part = VideoFile("video", str(path), 0.25, 0.5)
    rate, sounds, pictures = encoded(tmp_path, part, FileSound(part))
    assert (rate, sounds) == (12, 1) and numbers_of(pictures) == list(range(3, 9))
    with av.open(str(tmp_path / "out.mp4")) as container:
        assert sum(frame.samples for frame in container.decode(audio=0)) == pytest.approx(22_050, abs=2048)


def test_pictures_in_memory_are_encoded(tmp_path):
    images = torch.from_numpy(draw_pictures(30)) / 255
    rate, _, pictures = encoded(tmp_path, PictureBatch("video", images, Fraction(24)))
    assert rate == 24 and numbers_of(pictures) == list(range(30))


def test_a_file_in_memory_is_copied(tmp_path):
    content = write_video(tmp_path / "a.mp4", 4, sound=True).read_bytes()
    assert can_copy(io.BytesIO(content))
    path, shown = save_video(io.BytesIO(content), lambda *size: (tmp_path / "out.mp4", size), {})
    assert shown == (48, 32)
    with av.open(str(path)) as copied, av.open(io.BytesIO(content), mode="r") as source:
        packets = [[bytes(packet) for packet in each.demux(video=0) if packet.size] for each in (copied, source)]
    assert packets[0] == packets[1]


def test_a_cancel_leaves_nothing(tmp_path):
    def cancel():
        raise KeyboardInterrupt

    path = write_video(tmp_path / "a.mp4", 4)
    with pytest.raises(KeyboardInterrupt):
        encode_video(VideoFile("video", str(path)), None, lambda *_: (tmp_path / "out.mp4", None), {}, cancel)
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.mp4"]


def test_what_is_no_video_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"video \(in memory\) cannot be read as a video"):
        can_copy(io.BytesIO(b"no video"))
    with pytest.raises(FileNotFoundError, match="run the sampler again"):
        can_copy(Path(tmp_path / "gone.mp4"))


def test_a_name_with_nul_is_that_of_no_other_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", 4)
    content = path.read_bytes()
    with pytest.raises(ValueError, match="without NUL"):
        save_video(path, lambda *_: (tmp_path / "a.mp4\0b.mp4", None), {})
    with pytest.raises(ValueError, match="without NUL"):
        VideoFile("video", str(path) + "\0").facts()
    assert path.read_bytes() == content
