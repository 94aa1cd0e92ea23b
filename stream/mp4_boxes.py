"""The boxes of an mp4, looked at before FFmpeg makes tables of what they say.

FFmpeg believes the numbers of pictures in a file's index: some bytes can say billions of them, each of which takes
memory. Boxes and tables are those of ISO/IEC 14496-12: a size and a name, and in tables how many entries follow.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

# Wherever they are: FFmpeg reads them at the top of a damaged file, too.
_BOXES_WITHIN = frozenset(
    (
        b"moov",
        b"trak",
        b"mdia",
        b"minf",
        b"stbl",
        b"moof",
        b"traf",
        b"mvex",
        b"edts",
        b"udta",
        b"tref",
        b"sinf",
        b"wave",
    )
)
# Bytes of an entry, behind 8 bytes of version and number.
_ENTRIES = {
    b"stts": 8,
    b"ctts": 8,
    b"stss": 4,
    b"stps": 4,
    b"stsc": 12,
    b"stco": 4,
    b"co64": 8,
    # Names of titles: at least their size and namespace.
    b"keys": 8,
}
_RUNS = (b"stts", b"ctts")
_LOOKED_AT = _BOXES_WITHIN.union(_ENTRIES, (b"meta", b"trun", b"stsz", b"stz2"))
# The content, and room that was kept for some: as large as they like.
_ZEROS = bytes(4)
_PASSED_OVER = frozenset((b"mdat", b"free", b"skip", b"wide", _ZEROS))
# What else a fragment may say of each of its pictures: duration, size, flags and offset in time, by bits.
_OF_EACH, _BEFORE_THEM = (0x100, 0x200, 0x400, 0x800), (0x1, 0x4)
# Of an index, of which an hour takes a megabyte; and of a file in fragments.
_MOST_BYTES, _MOST_BOXES, _DEEPEST = 32_000_000, 4_000_000, 8
# Of zeros behind the last box, as a disk leaves them: FFmpeg takes its time to find nothing there.
_MOST_ZEROS = 64_000_000
# Of equal size, or without anything said of each: eleven hours of pictures.
_MOST_ALIKE = 1_000_000


class Mp4BoxesError(ValueError):
    """What a file says of itself cannot be; a part of a sentence."""

    # See CheckpointError.
    __module__ = "builtins"


def check_boxes(file: BinaryIO) -> None:
    """Look at an mp4's index; other kinds of files are left alone. The file stands at its start afterwards.

    Raises:
        Mp4BoxesError: an index is very large, or says more pictures than it describes.
        OSError: the file cannot be read.
    """
    size = file.seek(0, 2)
    file.seek(4)
    if file.read(4) in (b"ftyp", b"moov", b"moof", b"mdat", b"free", b"skip", b"wide"):
        alike = 0
        for kind, place, length in _top_boxes(file, size):
            if kind == _ZEROS and length > _MOST_ZEROS:
                raise Mp4BoxesError(f"{length} bytes of nothing follow its boxes: up to {_MOST_ZEROS} are passed over")
            if kind in _PASSED_OVER:
                continue
            if length > _MOST_BYTES:
                raise Mp4BoxesError(f"its index has {length} bytes, and up to {_MOST_BYTES} are read")
            if kind not in _LOOKED_AT:
                continue
            file.seek(place)
            whole = struct.pack(">I4s", 8 + length, kind) + file.read(length)
            alike += _check_index(memoryview(whole))
            if alike > _MOST_ALIKE:
                raise Mp4BoxesError(f"it says of {alike} pictures nothing but their number")
    file.seek(0)


def _top_boxes(file: BinaryIO, size: int) -> Iterator[tuple[bytes, int, int]]:
    """Name, place and length of what is in each box of the file; a last one that is cut off ends with the file."""
    place = 0
    for _ in range(_MOST_BOXES):
        file.seek(place)
        head = file.read(16)
        if len(head) < 8:
            return
        length, kind = struct.unpack_from(">I4s", head)
        behind = 8
        if length == 1 and len(head) == 16:
            length, behind = struct.unpack_from(">Q", head, 8)[0], 16
        end = size if length == 0 else min(size, place + length)
        if end < place + behind:
            # FFmpeg reads no further, either.
            return
        yield kind, place + behind, end - place - behind
        place = end
    raise Mp4BoxesError(f"it has more than {_MOST_BOXES} boxes")


@dataclass
class _Track:
    """What the tables of one track say.

    Attributes:
        handlers: what it is: pictures, sound, or what else.
        runs: pictures that the tables of times count, by name.
        sizes: pictures in its table of sizes.
        alike: of these, those of one size for all.
        is_steady: whether each lasts one tick, as the samples of sound that is not compressed.
    """

    handlers: set[bytes] = field(default_factory=set)
    runs: dict[bytes, int] = field(default_factory=dict)
    sizes: int = 0
    alike: int = 0
    is_steady: bool = False

    def check(self) -> None:
        """Raise Mp4BoxesError where FFmpeg would make room for more than the track describes."""
        # Of such sound FFmpeg reads many samples as one.
        if self.alike > _MOST_ALIKE and not (self.handlers == {b"soun"} and self.is_steady):
            raise Mp4BoxesError(f"stsz says {self.alike} pictures of one size, and up to {_MOST_ALIKE} are read")
        for kind, counted in self.runs.items():
            if counted > _MOST_ALIKE + self.sizes:
                raise Mp4BoxesError(f"{kind.decode()} has {counted} pictures and the file {self.sizes}")


def _check_index(index: memoryview) -> int:
    """How many pictures of fragments are only counted, among the boxes of an index."""
    alike, waiting, tracks = 0, [(index, 0, _Track())], [_Track()]
    while waiting:
        content, depth, track = waiting.pop()
        for kind, inside in _boxes_within(content):
            if kind in _BOXES_WITHIN and depth < _DEEPEST:
                if kind == b"trak":
                    tracks.append(_Track())
                waiting.append((inside, depth + 1, tracks[-1] if kind == b"trak" else track))
            elif kind == b"meta" and depth < _DEEPEST:
                # With a version, or without, as QuickTime has it.
                waiting.append((inside if inside[4:8] == b"hdlr" else inside[4:], depth + 1, _Track()))
            elif kind == b"trun":
                alike += _check_run(inside)
            else:
                _read_table(kind, inside, track)
    for track in tracks:
        track.check()
    return alike


def _read_table(kind: bytes, content: memoryview, track: _Track) -> None:
    if kind in _ENTRIES:
        counted = _check_table(kind, content)
        track.runs[kind] = max(track.runs.get(kind, 0), counted)
        if kind == b"stts":
            track.is_steady = bytes(content[4:8]) == bytes(content[12:16]) == b"\0\0\0\1"
    elif kind in (b"stsz", b"stz2"):
        _check_sizes(kind, content, track)
    elif kind == b"hdlr" and content[4:8] != b"dhlr":
        track.handlers.add(bytes(content[8:12]))


def _boxes_within(content: memoryview) -> Iterator[tuple[bytes, memoryview]]:
    place = 0
    while place + 8 <= len(content):
        length, kind = struct.unpack_from(">I4s", content, place)
        behind = 8
        if length == 1 and place + 16 <= len(content):
            length, behind = struct.unpack_from(">Q", content, place + 8)[0], 16
        end = len(content) if length == 0 else min(len(content), place + length)
        if end < place + behind:
            return
        yield kind, content[place + behind : end]
        place = end


def _check_table(kind: bytes, content: memoryview) -> int:
    """How many pictures a table of runs says; 0 of another."""
    if len(content) < 8:
        return 0
    (count,) = struct.unpack_from(">I", content, 4)
    if count * _ENTRIES[kind] > len(content) - 8:
        raise Mp4BoxesError(f"{kind.decode()} says {count} entries and has {len(content)} bytes")
    if kind not in _RUNS:
        return 0
    return sum(entry[0] for entry in struct.iter_unpack(">II", content[8 : 8 + 8 * count]))


def _check_sizes(kind: bytes, content: memoryview, track: _Track) -> None:
    if len(content) < 12:
        return
    (of_all, count) = struct.unpack_from(">II", content, 4)
    bits = 32 if kind == b"stsz" else max(1, of_all & 255)
    track.sizes = max(track.sizes, count)
    if kind == b"stsz" and of_all:
        track.alike = max(track.alike, count)
    elif count * bits > 8 * (len(content) - 12):
        raise Mp4BoxesError(f"{kind.decode()} says {count} pictures and has {len(content)} bytes")


def _check_run(content: memoryview) -> int:
    """How many pictures a run of a fragment counts and says nothing of."""
    if len(content) < 8:
        return 0
    flags, count = struct.unpack_from(">II", content)
    of_each = 4 * sum(bool(flags & bit) for bit in _OF_EACH)
    before = 8 + 4 * sum(bool(flags & bit) for bit in _BEFORE_THEM)
    if count * of_each > max(0, len(content) - before):
        raise Mp4BoxesError(f"trun says {count} pictures and has {len(content)} bytes")
    return 0 if of_each else int(count)
