"""An mp4 that grows by one fragment per block and is complete after each.

FFmpeg's own fragmenting holds the newest picture back until the next one comes. Here each block is muxed into
memory by FFmpeg as a separate fragmented mp4, and its fragment appended to the file: ISO/IEC 14496-12 lays
a fragmented file out as `ftyp moov` (once) followed by `moof mdat` pairs.
"""

from __future__ import annotations

import io
import os
import stat
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path

import av

_FLAGS = "empty_moov+default_base_moof+frag_custom+frag_discont"
_FILE_HEADER = (b"ftyp", b"moov")
_FRAGMENT = (b"moof", b"mdat")


class GrowingMp4:
    """Appends blocks of encoded packets to a file.

    Attributes:
        path: the file; created with the first block.
        blocks: how many blocks it holds, all of them playable.
        bytes: of the file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.blocks = self.bytes = 0

    @classmethod
    def reopen(cls, path: Path, blocks: int, size: int) -> GrowingMp4:
        """A file that goes on behind its first `blocks` blocks, `size` bytes; what lies behind these is dropped.

        Raises:
            OSError: the file is gone, shorter or another one; it is not changed then.
        """
        cut_fragments(path, blocks, size)
        file = cls(path)
        file.blocks, file.bytes = blocks, size
        return file

    def append(self, packets: Sequence[av.Packet], template: av.VideoStream) -> None:
        """Append one block; it is written to the file on return.

        Args:
            packets: of the block, in the order of decoding.
            template: the stream that they are of.

        Raises:
            OSError: it could not be written, and the file ends with the previous block; or it is not what this made
                of it: somebody has deleted or changed it.
        """
        wanted = _FRAGMENT if self.blocks else _FILE_HEADER + _FRAGMENT
        boxes = b"".join(data for kind, data in split_boxes(self._mux(packets, template)) if kind in wanted)
        if self.blocks:
            self.check()
        # Unbuffered: otherwise data that a full disk refused would stay in the buffer and be written by `truncate`.
        with self.path.open("r+b" if self.blocks else "wb", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            rest = memoryview(boxes)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
        self.blocks += 1
        self.bytes = end + len(boxes)

    def check(self) -> None:
        """Raise OSError, one sentence, unless the file is as long as it was made."""
        try:
            size = self.path.stat().st_size
        except OSError as error:
            raise FileNotFoundError(
                f"{self.path} was deleted while the stream went on: its pictures are lost; start the stream again."
            ) from error
        if size != self.bytes:
            raise OSError(
                f"{self.path} has {size} bytes and the stream wrote {self.bytes}: another program has changed it; "
                "start the stream again."
            )

    def sync(self) -> None:
        """Have what was written outlast a power failure."""
        with self.path.open("r+b") as file:
            os.fsync(file.fileno())

    def _mux(self, packets: Sequence[av.Packet], template: av.VideoStream) -> bytes:
        memory = io.BytesIO()
        # Keep the timestamps: by default each muxer shifts its block to start at 0.
        options = {"movflags": _FLAGS, "fragment_index": str(self.blocks + 1), "avoid_negative_ts": "disabled"}
        with av.open(memory, mode="w", format="mp4", options=options) as container:
            stream = container.add_stream_from_template(template)
            for packet in packets:
                packet.stream = stream
                container.mux(packet)
        return memory.getvalue()


def split_boxes(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The top-level boxes of an mp4 as (type, whole box); sizes of 32 and 64 bits."""
    position = 0
    while position < len(data):
        size, kind = struct.unpack_from(">I4s", data, position)
        if size == 1:
            (size,) = struct.unpack_from(">Q", data, position + 8)
        yield kind, data[position : position + size]
        position += size


def check_fragments(path: Path, blocks: int, size: int) -> None:
    """Raise OSError, one sentence, unless the first `size` bytes of `path` are `blocks` blocks of a growing mp4.

    Reads the heads of the boxes only, and no more of them than such a file has.
    """
    try:
        facts = path.stat()
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path}, the video of the stream so far, is no file: start a new stream.")
        found, position, there = 0, 0, facts.st_size
        with path.open("rb") as file:
            for _ in range(len(_FILE_HEADER) + len(_FRAGMENT) * blocks):
                if position >= min(size, there):
                    break
                file.seek(position)
                length, kind = struct.unpack(">I4s", file.read(8))
                if length == 1:
                    (length,) = struct.unpack(">Q", file.read(8))
                if length < 8:
                    break
                found += kind == b"moof"
                position += length
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{path}, the video of the stream so far, is gone: go on from the saved stream by Load Saved Stream, or "
            "start a new stream."
        ) from error
    except struct.error:
        found = -1
    if there < size:
        raise OSError(
            f"{path}, the video of the stream so far, has {there} bytes and had {size} when the stream was saved: go "
            "on from the saved stream by Load Saved Stream, or start a new stream."
        )
    if position != size or found != blocks:
        raise OSError(
            f"{path}, the video of the stream so far, is another one than when the stream was saved: go on from the "
            "saved stream by Load Saved Stream, or start a new stream."
        )


def cut_fragments(path: Path, blocks: int, size: int) -> None:
    """Drop what lies behind the first `size` bytes; raises what `check_fragments` does, and changes nothing then."""
    check_fragments(path, blocks, size)
    os.truncate(path, size)
