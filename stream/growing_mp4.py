"""An mp4 that grows by one fragment per block and is complete after each.

FFmpeg's own fragmenting holds the newest picture back until the next one comes. Here each block is muxed into
memory by FFmpeg as a separate fragmented mp4, and its fragment appended to the file: ISO/IEC 14496-12 lays
a fragmented file out as `ftyp moov` (once) followed by `moof mdat` pairs.
"""

from __future__ import annotations

import io
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
    """

    def __init__(self, path: Path, template: av.VideoStream) -> None:
        self.path = path
        self.blocks = 0
        self._template = template

    def append(self, packets: Sequence[av.Packet], template: av.VideoStream | None = None) -> None:
        """Append one block; it is written to the file on return.

        Args:
            packets: of the block, in the order of decoding.
            template: the stream that they are of; None for that of the file.

        Raises:
            OSError: it could not be written; the file ends with the previous block.
        """
        wanted = _FRAGMENT if self.blocks else _FILE_HEADER + _FRAGMENT
        boxes = b"".join(
            data for kind, data in split_boxes(self._mux(packets, template or self._template)) if kind in wanted
        )
        mode = "ab" if self.blocks else "wb"
        # Unbuffered: otherwise data that a full disk refused would stay in the buffer and be written by `truncate`.
        with self.path.open(mode, buffering=0) as file:
            end = file.tell()
            rest = memoryview(boxes)
            try:
                while rest:
                    rest = rest[file.write(rest) :]
            except OSError:
                file.truncate(end)
                raise
        self.blocks += 1

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
