"""A video that begins with another's pictures: as PyAV decodes it, and the other file untouched."""

import av
import pytest
import torch
from test_sinks import decode, pictures

from streamblocks.stream.sinks import Mp4Sink


def written(path, blocks, **options):
    sink = Mp4Sink(path, **options)
    for seed, count in blocks:
        sink.write(pictures(count, seed=seed))
    return sink


def frame_times(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        times = [frame.time for frame in container.decode(stream)]
        assert (stream.start_time, stream.frames) == (0, len(times))
        return times, float(stream.average_rate or 0)


# More pictures than are copied at a time; a rate that is no whole number.
@pytest.mark.parametrize(("fps", "blocks"), [(16, 2), (23.976, 21)])
def test_the_earlier_pictures_come_first(tmp_path, fps, blocks):
    first = [(seed, 12) for seed in range(blocks)]
    written(tmp_path / "a.mp4", first, fps=fps).close()
    content = (tmp_path / "a.mp4").read_bytes()
    written(tmp_path / "b.mp4", [(50, 12), (51, 9)], fps=fps).close()
    joined = written(tmp_path / "joined.mp4", [(50, 12), (51, 9)], fps=fps, begin_with=tmp_path / "a.mp4")
    expected = torch.cat([decode(tmp_path / "a.mp4"), decode(tmp_path / "b.mp4")])
    # It grows as any other.
    assert torch.equal(decode(tmp_path / "joined.mp4"), expected)
    assert joined.close() is None
    assert torch.equal(decode(tmp_path / "joined.mp4"), expected)
    assert joined.frames_written == len(expected) == 12 * blocks + 21
    times, rate = frame_times(tmp_path / "joined.mp4")
    assert rate == pytest.approx(fps)
    assert times == pytest.approx([index / rate for index in range(len(expected))])
    assert (tmp_path / "a.mp4").read_bytes() == content


def test_a_joined_video_is_joined_again(tmp_path):
    written(tmp_path / "a.mp4", [(0, 9)]).close()
    written(tmp_path / "ab.mp4", [(1, 12)], begin_with=tmp_path / "a.mp4").close()
    written(tmp_path / "abc.mp4", [(2, 12)], begin_with=tmp_path / "ab.mp4").close()
    written(tmp_path / "c.mp4", [(2, 12)]).close()
    assert torch.equal(
        decode(tmp_path / "abc.mp4"), torch.cat([decode(tmp_path / "ab.mp4"), decode(tmp_path / "c.mp4")])
    )


def test_a_stream_without_pictures_leaves_no_copy(tmp_path):
    written(tmp_path / "a.mp4", [(0, 9)]).close()
    Mp4Sink(tmp_path / "b.mp4", begin_with=tmp_path / "a.mp4").close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]


def test_a_file_of_other_pictures_is_named(tmp_path):
    written(tmp_path / "a.mp4", [(0, 9)]).close()
    sink = Mp4Sink(tmp_path / "b.mp4", begin_with=tmp_path / "a.mp4")
    with pytest.raises(ValueError, match=r"has pictures of 48x32 and the stream makes 64x32: .* switch same_video off"):
        sink.write(torch.zeros((1, 32, 64, 3), dtype=torch.uint8))
    sink.close()
    # Another rate is in the parameter sets.
    sink = Mp4Sink(tmp_path / "b.mp4", fps=8, begin_with=tmp_path / "a.mp4")
    with pytest.raises(ValueError, match="was encoded with other settings than this stream is"):
        sink.write(pictures(9))
    sink.close()
    assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
