"""The growing mp4, read by PyAV; and what stays in memory."""

import errno
import json
import shutil
import subprocess

import av
import pytest
import torch

from streamblocks.stream.frames import to_image_batch, to_uint8_frames
from streamblocks.stream.keep_frames import KeepFrames
from streamblocks.stream.remux import remux_mp4
from streamblocks.stream.save_video import save_video
from streamblocks.stream.sinks import FrameKeeper, Mp4Sink


def pictures(count, value=None, seed=0):
    if value is not None:
        return torch.full((count, 32, 48, 3), value, dtype=torch.uint8)
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((count, 3, 2, 3), generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, size=(32, 48), mode="bilinear")
    return to_uint8_frames([smooth])


def decode(path):
    with av.open(str(path)) as container:
        return torch.stack([torch.from_numpy(f.to_ndarray(format="rgb24")) for f in container.decode(video=0)])


def test_the_file_plays_up_to_the_last_block_while_it_grows(tmp_path):
    sink = Mp4Sink(tmp_path / "a.mp4")
    written = 0
    for block in range(4):
        frames = pictures(9 if block == 0 else 12, seed=block)
        sink.write(frames)
        written += len(frames)
        # A copy, as a crash would leave it: nothing is flushed by closing.
        copy = shutil.copy(tmp_path / "a.mp4", tmp_path / "copy.mp4")
        assert len(decode(copy)) == written == sink.frames_written
    sink.close()
    sink.close()
    assert len(decode(tmp_path / "a.mp4")) == written
    assert list(tmp_path.glob("*.plain.mp4")) == []


def test_pictures_come_back_as_written(tmp_path):
    sink = Mp4Sink(tmp_path / "a.mp4", fps=24, crf=1)
    frames = pictures(9)
    sink.write(frames)
    sink.close()
    error = (decode(tmp_path / "a.mp4").float() - frames.float()).abs().mean()
    assert error < 4.0
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.width, stream.height, stream.frames) == (48, 32, 9)
        assert stream.average_rate == 24
        assert container.duration == pytest.approx(9 / 24 * 1_000_000, rel=0.01)


def test_each_block_starts_with_a_key_frame(tmp_path):
    sink = Mp4Sink(tmp_path / "a.mp4")
    for block in range(3):
        sink.write(pictures(5, seed=block))
    sink.close()
    with av.open(str(tmp_path / "a.mp4")) as container:
        keys = [index for index, frame in enumerate(container.decode(video=0)) if frame.key_frame]
    assert {0, 5, 10} <= set(keys)


def test_a_sink_without_pictures_makes_no_file(tmp_path):
    sink = Mp4Sink(tmp_path / "a.mp4")
    sink.close()
    assert list(tmp_path.iterdir()) == []


def unwilling(error):
    def fail(*arguments, **named):
        raise error

    return fail


@pytest.mark.parametrize(
    ("where", "error"),
    [
        ("pathlib.Path.replace", PermissionError(13, "The process cannot access the file")),
        ("streamblocks.stream.sinks.remux_mp4", av.error.InvalidDataError(1094995529, "Invalid data found")),
        ("streamblocks.stream.sinks.remux_mp4", RuntimeError("no such muxer")),
        # What is left of the rewrite cannot be deleted either.
        ("pathlib.Path.unlink", PermissionError(13, "The process cannot access the file")),
    ],
    ids=["open in a player", "PyAV's own error", "anything", "not removed"],
)
def test_a_failed_rewrite_keeps_the_growing_mp4_and_says_so(tmp_path, monkeypatch, where, error):
    sink = Mp4Sink(tmp_path / "a.mp4")
    sink.write(pictures(9))
    sink.write(pictures(12, seed=1))
    monkeypatch.setattr(where, unwilling(error))
    notice = sink.close()
    if "unlink" in where:
        assert notice is None
    else:
        assert notice is not None
        assert str(error) in notice and str(tmp_path / "a.mp4") in notice and "holds all 21 pictures" in notice
        assert [path.name for path in tmp_path.iterdir()] == ["a.mp4"]
    assert sink.close() is None
    assert len(decode(tmp_path / "a.mp4")) == 21
    save_video(tmp_path / "a.mp4", lambda w, h: (tmp_path / "saved.mp4", None), {})
    assert len(decode(tmp_path / "saved.mp4")) == 21


def test_a_finished_sink_takes_no_more_pictures(tmp_path):
    sink, unused, keeper = Mp4Sink(tmp_path / "a.mp4"), Mp4Sink(tmp_path / "b.mp4"), FrameKeeper(KeepFrames.ALL)
    for each in (sink, keeper):
        each.write(pictures(9))
    for each in (sink, unused, keeper):
        each.close()
    written = (tmp_path / "a.mp4").read_bytes()
    for each, sentence in ((sink, "a.mp4 is finished"), (unused, "b.mp4 is finished"), (keeper, "are complete")):
        with pytest.raises(ValueError, match=sentence):
            each.write(pictures(12))
    assert (tmp_path / "a.mp4").read_bytes() == written and not (tmp_path / "b.mp4").exists()
    kept = keeper.frames()
    assert kept is not None and len(kept) == 9


def test_saving_copies_packets_and_embeds_the_workflow(tmp_path):
    sink = Mp4Sink(tmp_path / "a.mp4")
    sink.write(pictures(9))
    sink.close()
    workflow = {"nodes": [{"id": 1, "type": "äöü"}]}
    target = tmp_path / "out.mp4"
    path, shown = save_video(tmp_path / "a.mp4", lambda w, h: (target, (w, h)), {"workflow": json.dumps(workflow)})
    assert path == target
    assert shown == (48, 32)
    with av.open(str(target)) as copied, av.open(str(tmp_path / "a.mp4")) as source:
        assert json.loads(copied.metadata["workflow"]) == workflow
        packets = [
            [bytes(packet) for packet in container.demux(video=0) if packet.size] for container in (copied, source)
        ]
    assert packets[0] == packets[1]
    assert (tmp_path / "a.mp4").is_file()


def test_saving_keeps_the_sound(tmp_path):
    with av.open(str(tmp_path / "talkie.mp4"), "w") as container:
        video = container.add_stream("libx264", rate=16)
        video.width, video.height, video.pix_fmt = 48, 32, "yuv420p"
        sound = container.add_stream("aac", rate=16000)
        for picture in pictures(8).numpy():
            container.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        silence = av.AudioFrame(format="fltp", layout="mono", samples=8000)
        silence.sample_rate = 16000
        silence.planes[0].update(bytes(silence.planes[0].buffer_size))
        container.mux(sound.encode(silence))
        container.mux([*video.encode(None), *sound.encode(None)])
    remux_mp4(tmp_path / "talkie.mp4", tmp_path / "out.mp4")
    with av.open(str(tmp_path / "out.mp4")) as copied:
        assert sorted(stream.type for stream in copied.streams) == ["audio", "video"]
        assert sum(frame.samples for frame in copied.decode(audio=0)) >= 8000


def test_a_vanished_source_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the sampler again"):
        save_video(tmp_path / "gone.mp4", lambda w, h: (tmp_path / "b.mp4", None), {})


def test_a_failed_copy_leaves_nothing(tmp_path):
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="Invalid data"):
        remux_mp4(tmp_path / "bad.mp4", tmp_path / "out.mp4")
    assert not (tmp_path / "out.mp4").exists()


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 160 kB, where the machine lets us mount one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "tmpfs", str(folder)], capture_output=True)
    if mounted.returncode:
        pytest.skip(f"cannot mount a small disk here: {mounted.stderr.decode().strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def noise(count):
    return torch.randint(0, 255, (count, 64, 96, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def test_a_full_disk_while_streaming_keeps_the_pictures_written(small_disk):
    sink = Mp4Sink(small_disk / "a.mp4")
    with pytest.raises(OSError, match="pictures written so far are kept") as raised:
        for _ in range(100):
            sink.write(noise(12))
    assert raised.value.errno == errno.ENOSPC
    assert sink.frames_written > 0
    assert "No space left on device" in str(sink.close())
    assert [path.name for path in small_disk.iterdir()] == ["a.mp4"]
    assert len(decode(small_disk / "a.mp4")) == sink.frames_written


def test_a_full_disk_while_saving_loses_nothing(small_disk, tmp_path):
    sink = Mp4Sink(tmp_path / "a.mp4")
    for _ in range(6):
        sink.write(noise(12))
    sink.close()
    assert (tmp_path / "a.mp4").stat().st_size > 200_000
    with pytest.raises(OSError, match=r"nothing is lost, the video is still in .*a\.mp4"):
        save_video(tmp_path / "a.mp4", lambda w, h: (small_disk / "out.mp4", None), {})
    assert not (small_disk / "out.mp4").exists()
    assert len(decode(tmp_path / "a.mp4")) == 72


@pytest.mark.parametrize(("keep", "expected"), [("all", [1, 1, 2, 2]), ("last block", [2, 2]), ("none", None)])
def test_kept_frames(keep, expected):
    keeper = FrameKeeper(KeepFrames(keep))
    keeper.write(pictures(2, value=1))
    keeper.write(pictures(2, value=2))
    frames = keeper.frames()
    assert (None if frames is None else frames[:, 0, 0, 0].tolist()) == expected


def test_pictures_of_every_kind_become_uint8():
    frames = pictures(3)
    as_float = frames.float() / 255
    expected = frames
    assert torch.equal(to_uint8_frames([frames]), expected)
    assert torch.equal(to_uint8_frames(as_float.numpy()[None]), expected)
    assert torch.equal(to_uint8_frames(as_float.permute(0, 3, 1, 2)[None]), expected)
    from PIL import Image

    assert torch.equal(to_uint8_frames([[Image.fromarray(f.numpy()) for f in frames]]), expected)
    assert torch.equal(to_image_batch(frames), as_float)
    with pytest.raises(ValueError, match="NaN"):
        to_uint8_frames([as_float * float("nan")])
    with pytest.raises(ValueError, match="four axes"):
        to_uint8_frames([as_float[0]])
    with pytest.raises(ValueError, match="is str"):
        to_uint8_frames(["no video"])


def decoded(file):
    with av.open(str(file)) as container:
        return torch.stack([torch.from_numpy(one.to_ndarray(format="rgb24")) for one in container.decode(video=0)])


def test_a_file_that_goes_on_has_the_pictures_of_one_that_never_stopped(tmp_path):
    """The encoder's quantizers depend on nothing before the block; here they would, from still to noise."""
    noise = torch.Generator().manual_seed(0)
    blocks = [torch.randint(0, 40 * index + 1, (12, 64, 64, 3), generator=noise).byte() for index in range(5)]
    whole, first = Mp4Sink(tmp_path / "whole.mp4"), Mp4Sink(tmp_path / "a.mp4", finish_at=tmp_path / "b.mp4")
    for block in blocks:
        whole.write(block)
    for block in blocks[:3]:
        first.write(block)
    rest = Mp4Sink(tmp_path / "a.mp4", finish_at=tmp_path / "again.mp4", resume=first.mark())
    for block in blocks[3:]:
        rest.write(block)
    for sink in (whole, rest):
        sink.close()
    assert torch.equal(decoded(rest.path), decoded(whole.path)) and len(decoded(rest.path)) == 60
