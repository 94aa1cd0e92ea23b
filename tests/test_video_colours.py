"""Colours in videos: what our files say and hold, by a formula of our own, and what is read from others' files."""

from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from av.video.reformatter import ColorRange, Colorspace

from streamblocks.stream.joined_mp4 import check_earlier
from streamblocks.stream.picture_sources import VideoFile
from streamblocks.stream.remux import remux_mp4
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.sound_track import FileSound, SoundPlan, add_sound

from drawn_videos import write_video

COLOURS = [(0, 255, 0), (255, 0, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0), (128, 128, 128), (17, 200, 99)]
# Weights of red and blue in luma: ITU-R BT.709-6, item 3.2, and BT.601-7, 2.5.1.
BT709, BT601 = (0.2126, 0.0722), (0.299, 0.114)
# `colr` of ISO/IEC 14496-12, 12.1.5: primaries, transfer and matrix are 1, and the range is not full.
COLR = b"colrnclx" + bytes((0, 1, 0, 1, 0, 1, 0))


def to_yuv(colour, weights, full=False):
    """Item 3.4 and 3.5 of BT.709-6, in 8 bits; not FFmpeg's."""
    red, green, blue = (part / 255 for part in colour)
    of_red, of_blue = weights
    luma = of_red * red + (1 - of_red - of_blue) * green + of_blue * blue
    chroma = (blue - luma) / (2 - 2 * of_blue), (red - luma) / (2 - 2 * of_red)
    if full:
        return [round(255 * luma), *(min(255, round(128 + 255 * part)) for part in chroma)]
    return [round(16 + 219 * luma), *(round(128 + 224 * part) for part in chroma)]


def written(path, size=(64, 48), begin_with=None):
    sink = Mp4Sink(path, begin_with=begin_with)
    for colour in COLOURS:
        sink.write(torch.tensor(colour, dtype=torch.uint8).expand(1, size[1], size[0], 3).contiguous())
    return sink


def check_file(path, expected=COLOURS):
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = (context.colorspace, context.color_primaries, context.color_trc, context.color_range)
        assert tags == (1, 1, 1, 1)
        shown = list(container.decode(video=0))
    assert path.read_bytes().count(COLR) == 1
    for frame, colour in zip(shown, expected, strict=True):
        stored = [bytes(plane)[plane.line_size * 8 + 8] for plane in frame.planes]
        assert np.abs(np.subtract(stored, to_yuv(colour, BT709), dtype=float)).max() <= 1, colour
        # As a player takes it, which goes by the tags.
        assert np.abs(frame.to_ndarray(format="rgb24")[8, 8].astype(int) - colour).max() <= 2, colour


def test_our_files_are_bt709_and_say_so_while_they_grow_and_after(tmp_path):
    path = tmp_path / "a.mp4"
    sink = written(path)
    check_file(path)
    sink.close()
    check_file(path)
    joined = written(tmp_path / "joined.mp4", begin_with=path)
    check_file(joined.path, COLOURS * 2)
    joined.close()
    check_file(joined.path, COLOURS * 2)
    remux_mp4(joined.path, tmp_path / "saved.mp4", {"workflow": "{}"})
    check_file(tmp_path / "saved.mp4", COLOURS * 2)
    # The pictures are copied when sound is written.
    sound = FileSound(VideoFile("video", str(write_video(tmp_path / "sound.mp4", sound=True))))
    assert add_sound(path, sound, SoundPlan(delay=Fraction(0), seconds=Fraction(len(COLOURS), 16))) is None
    check_file(path)
    with av.open(str(path)) as container:
        assert len(container.streams.audio) == 1


def test_a_file_of_an_earlier_version_is_named_before_the_stream(tmp_path):
    path = write_video(tmp_path / "old.mp4", 4)
    with pytest.raises(ValueError, match=r"old\.mp4, has the colours of an earlier .* switch same_video off"):
        check_earlier(path, 4)
    sink = Mp4Sink(tmp_path / "b.mp4", begin_with=path)
    with pytest.raises(ValueError, match="colours of an earlier version"):
        sink.write(torch.zeros((1, 32, 48, 3), dtype=torch.uint8))


def foreign(path, size, weights, *, full=False, tags=None, pixels="yuv420p"):
    """A file of the colours, stored by the formula; `tags` are matrix and range, or None for no tags."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=Fraction(8))
        (stream.width, stream.height), stream.pix_fmt = size, pixels
        stream.options = {"crf": "1", "preset": "ultrafast"}
        if tags is not None:
            stream.codec_context.colorspace, stream.codec_context.color_range = tags
        for colour in COLOURS:
            frame = av.VideoFrame(size[0], size[1], pixels)
            for plane, value in zip(frame.planes, to_yuv(colour, weights, full), strict=True):
                plane.update(bytes([value]) * plane.buffer_size)
            if tags is not None:
                frame.colorspace, frame.color_range = tags
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


SMALL, HIGH, WIDE = (64, 48), (64, 720), (1280, 64)


@pytest.mark.parametrize(
    ("size", "weights", "options"),
    [
        (SMALL, BT601, {}),
        (HIGH, BT709, {}),
        (WIDE, BT709, {}),
        (SMALL, BT709, {"tags": (1, ColorRange.MPEG)}),
        (HIGH, BT601, {"tags": (6, ColorRange.MPEG)}),
        (HIGH, BT601, {"tags": (Colorspace.ITU601, ColorRange.MPEG)}),
        (SMALL, BT709, {"tags": (1, ColorRange.JPEG), "full": True}),
        (SMALL, BT601, {"tags": (2, ColorRange.JPEG), "full": True, "pixels": "yuvj420p"}),
    ],
    ids=["small", "high", "wide", "bt709", "bt601", "bt470bg", "full", "full of old"],
)
def test_files_are_read_by_their_tags_or_by_their_size(tmp_path, size, weights, options):
    path = foreign(tmp_path / "a.mp4", size, weights, **options)
    pictures = [shown.picture[8, 8] for shown in VideoFile("video", str(path)).pictures()]
    assert (torch.stack(pictures).int() - torch.tensor(COLOURS)).abs().max() <= 3
