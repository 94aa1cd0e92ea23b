"""Pictures and videos from strangers, and the videos that unfinished streams go on with."""

from __future__ import annotations

import io
import itertools
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

import av
import numpy as np
import streamblocks_path  # noqa: F401
import torch
from fuzz_mutations import change_bytes
from fuzz_target import Target, names
from PIL import Image

from streamblocks.stream.joined_mp4 import check_earlier
from streamblocks.stream.jpeg_pictures import decode_jpeg
from streamblocks.stream.picture_sources import VideoFile
from streamblocks.stream.run_point import VideoMark
from streamblocks.stream.save_video import can_copy
from streamblocks.stream.sinks import Mp4Sink
from streamblocks.stream.sound_track import FileSound

_WIDTH, _HEIGHT, _PICTURES = 32, 16, 2
_SIDES = (0, 1, 15, 16, 255, 1000, 4000, 4096, 4097, 65535)
_SIZES = (0, 1, 7, 8, 9, 100, 2**16, 2**31 - 1, 2**31, 2**32 - 1)


def _jpegs() -> list[bytes]:
    """Small ones of every kind that Pillow writes."""
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (24, 40, 3), np.uint8))
    kinds: list[tuple[str, dict[str, object]]] = [
        ("RGB", {}),
        ("RGB", {"progressive": True}),
        ("RGB", {"subsampling": 0, "restart_marker_blocks": 1}),
        ("RGB", {"optimize": True, "exif": b"Exif\0\0MM\0*\0\0\0\x08\0\0\0\0\0\0", "comment": b"a"}),
        ("L", {}),
        ("L", {"progressive": True}),
        ("CMYK", {}),
        ("CMYK", {"progressive": True}),
    ]
    written = []
    for mode, options in kinds:
        held = io.BytesIO()
        picture.convert(mode).save(held, "JPEG", quality=60, **options)
        written.append(held.getvalue())
    return written


class _WriteJpeg:
    def __init__(self) -> None:
        self._seeds = _jpegs()

    def __call__(self, random: Random, folder: Path) -> None:
        content = random.choice(self._seeds)
        for _ in range(random.choice((0, 1, 1, 2))):
            content = _with_marker_changed(random, content)
        if random.randrange(3):
            content = change_bytes(random, content)
        (folder / "picture.jpg").write_bytes(content)


def _with_marker_changed(random: Random, jpeg: bytes) -> bytes:
    """Another size or kind in the header, or more of the scans."""
    frame = next((place for kind in (0xC0, 0xC2) if (place := jpeg.find(bytes((255, kind)))) > 0), 0)
    scan = jpeg.find(b"\xff\xda")
    what = random.randrange(5)
    if what < 3 and frame:
        sides = struct.pack(">HH", random.choice(_SIDES), random.choice(_SIDES))
        return jpeg[: frame + 5] + sides + jpeg[frame + 9 :]
    if what == 3 and frame:
        return jpeg[: frame + 1] + bytes((random.choice((0xC0, 0xC1, 0xC2, 0xC3, 0xC9, 0xCA)),)) + jpeg[frame + 2 :]
    return jpeg[:-2] + jpeg[scan:-2] * random.choice((1, 3, 70)) + jpeg[-2:]


class Videos:
    """Good ones: as a stream writes it while it grows, and finished, and with sound."""

    def __init__(self) -> None:
        with TemporaryDirectory() as place:
            growing, plain, loud = (Path(place) / name for name in ("growing.mp4", "plain.mp4", "loud.mp4"))
            sink = Mp4Sink(growing, finish_at=plain)
            for _ in range(2):
                sink.write(_pictures())
            self.mark = sink.mark()
            sink.close()
            _write_with_sound(loud)
            self.growing = growing.read_bytes()
            self.finished = [plain.read_bytes(), loud.read_bytes()]


def _pictures() -> torch.Tensor:
    return torch.randint(0, 255, (_PICTURES, _HEIGHT, _WIDTH, 3), dtype=torch.uint8)


def _write_with_sound(path: Path) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        video = container.add_stream("libx264", rate=25)
        video.width, video.height, video.pix_fmt = _WIDTH, _HEIGHT, "yuv420p"
        sound = container.add_stream("aac", rate=8000, layout="mono")
        for _ in range(3):
            container.mux(video.encode(av.VideoFrame.from_ndarray(_pictures()[0].numpy(), format="rgb24")))
            piece = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            piece.sample_rate = 8000
            container.mux(sound.encode(piece))
        container.mux(video.encode(None))
        container.mux(sound.encode(None))


class _WriteVideo:
    def __init__(self, seeds: Sequence[bytes]) -> None:
        self._seeds = seeds
        self._boxes = [list(_boxes(seed)) for seed in seeds]

    def __call__(self, random: Random, folder: Path) -> None:
        index = random.randrange(len(self._seeds))
        content = bytearray(self._seeds[index])
        for _ in range(random.choice((0, 1, 1, 2))):
            place, length = random.choice(self._boxes[index])
            what = random.randrange(4)
            if what == 0:
                content[place : place + 4] = struct.pack(">I", random.choice(_SIZES))
            elif what == 1 and length > 16:
                # Numbers of things, and sizes of pictures.
                inside = random.randrange(8, length - 4)
                content[place + inside : place + inside + 4] = struct.pack(">I", random.choice(_SIZES))
            elif what == 2:
                content[place + 4 : place + 8] = random.choice(
                    (b"free", b"moov", b"moof", b"mdat", b"\0\0\0\0", b"trak")
                )
            elif length > 8:
                changed = change_bytes(random, bytes(content[place + 8 : place + length]))
                content[place + 8 : place + length] = (changed + b"\0" * length)[: length - 8]
        whole = bytes(content)
        if random.randrange(4) == 0:
            whole = change_bytes(random, whole)
        path = folder / "video.mp4"
        path.write_bytes(whole)
        if random.randrange(12) == 0:
            with path.open("r+b") as file:
                file.truncate(random.choice((0, 7, len(whole) // 2, len(whole) + 8, 2**28, 2**34)))


_INSIDE = (b"moov", b"trak", b"mdia", b"minf", b"stbl", b"moof", b"traf", b"mvex")


def _boxes(data: bytes, start: int = 0, end: int | None = None) -> list[tuple[int, int]]:
    """Place and length of each box, and of those inside it."""
    found, place, end = [], start, len(data) if end is None else end
    while place + 8 <= end:
        length, kind = struct.unpack_from(">I4s", data, place)
        found.append((place, length))
        if kind in _INSIDE:
            found += _boxes(data, place + 8, place + length)
        place += max(8, length)
    return found


class _Resume:
    """Goes on with a video behind the block that a snapshot says."""

    def __init__(self, mark: VideoMark) -> None:
        self._mark = mark

    def __call__(self, folder: Path) -> object:
        """Write a block, and finish."""
        path = folder / "video.mp4"
        mark = VideoMark(self._mark.fragments, min(self._mark.bytes, path.stat().st_size), self._mark.pictures)
        if path.stat().st_size in (2**28, 2**34):
            mark = VideoMark(10**6, path.stat().st_size, 10**6)
        sink = Mp4Sink(path, finish_at=folder / "finished.mp4", resume=mark)
        sink.write(_pictures())
        return sink.close()


def _join(folder: Path) -> object:
    """Begin a stream's video with another."""
    path = folder / "video.mp4"
    check_earlier(path, 2 * _PICTURES)
    sink = Mp4Sink(folder / "joined.mp4", begin_with=path)
    sink.write(_pictures())
    return sink.close()


def _take(folder: Path) -> object:
    """Take the pictures and the sound of a video."""
    video = VideoFile("video", str(folder / "video.mp4"))
    facts = video.facts()
    taken = sum(1 for _ in itertools.islice(video.pictures(), 8))
    taken += sum(1 for _ in itertools.islice(video.last_pictures(Fraction(1, 10)), 8))
    sound = FileSound(video)
    kind = sound.format()
    if kind is not None:
        taken += sum(1 for _ in itertools.islice(sound.samples(kind), 8))
    return facts, taken, can_copy(folder / "video.mp4")


def picture_targets() -> list[Target]:
    """Of pictures and videos."""
    videos = Videos()
    of_file = names(kinds=(ValueError, OSError, FileNotFoundError))
    return [
        Target(
            "jpeg", 14, _WriteJpeg(), lambda f: decode_jpeg((f / "picture.jpg").read_bytes()), names("The picture ")
        ),
        Target("resumed video", 3, _WriteVideo([videos.growing]), _Resume(videos.mark), of_file),
        Target("video before", 3, _WriteVideo([videos.finished[0], videos.growing]), _join, of_file),
        Target("video", 4, _WriteVideo([*videos.finished, videos.growing]), _take, names("video 'video.mp4'")),
    ]
