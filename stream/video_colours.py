"""How videos hold colours: ours as BT.709, tagged; others by what they say of themselves."""

from __future__ import annotations

import av
import torch
from av.video.reformatter import ColorRange, Colorspace, VideoReformatter

# Code points of ITU-T H.273, tables 2 to 4: BT.709 is 1 in each; 2 says nothing, 3 is reserved.
_BT709 = 1
_UNTAGGED = (2, 3)
# FFmpeg's `AVColorRange`: 16 to 235 for black to white, or 0 to 255.
_LIMITED = 1
_FULL = 2
# Above standard definition, untagged files mean BT.709, as players take them (BT.601 is that of 720x576 and below).
_HIGH_WIDTH = 1280
_HIGH_HEIGHT = 720

# Matrix, primaries, transfer and range.
ColourTags = tuple[int, int, int, int]
BT709_TAGS: ColourTags = (_BT709, _BT709, _BT709, _LIMITED)


def tag_bt709(stream: av.VideoStream) -> None:
    """Have an encoder, not yet open, write into its headers that the pictures are BT.709 of limited range."""
    context = stream.codec_context
    context.colorspace, context.color_primaries, context.color_trc, context.color_range = BT709_TAGS


def colour_tags(stream: av.VideoStream) -> ColourTags:
    """What a stream says of its colours."""
    context = stream.codec_context
    return context.colorspace, context.color_primaries, context.color_trc, context.color_range


class Bt709Pictures:
    """Brings RGB to what `tag_bt709` says, in yuv420p. ITU-R BT.709-6, items 3.2 to 3.5, by FFmpeg's swscale."""

    def __init__(self) -> None:
        # One for all pictures: its tables are made once.
        self._reformatter = VideoReformatter()

    def convert(self, frame: av.VideoFrame) -> av.VideoFrame:
        """A frame of rgb24, with even width and height, as yuv420p."""
        made = self._reformatter.reformat(
            frame, format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
        )
        # Older PyAVs convert without saying so.
        made.colorspace, made.color_range = _BT709, _LIMITED
        return made


class RgbPictures:
    """Brings the frames of a file to RGB: by the file's tags, or by the size of what has none."""

    def __init__(self) -> None:
        self._reformatter = VideoReformatter()

    def convert(self, frame: av.VideoFrame) -> torch.Tensor:
        """uint8 [height, width, 3], turned as the file says (phones film sideways)."""
        matrix, full = frame.colorspace, frame.color_range == _FULL or frame.format.name.startswith("yuvj")
        if matrix in _UNTAGGED:
            high = frame.width >= _HIGH_WIDTH or frame.height >= _HIGH_HEIGHT
            matrix = Colorspace.ITU709 if high else Colorspace.ITU601
        if frame.format.is_rgb or frame.format.name.startswith("gray"):
            made = self._reformatter.reformat(frame, format="rgb24")
        else:
            made = self._reformatter.reformat(
                frame,
                format="rgb24",
                src_colorspace=matrix,
                dst_colorspace=matrix,
                src_color_range=ColorRange.JPEG if full else ColorRange.MPEG,
                dst_color_range=ColorRange.JPEG,
            )
        picture = torch.from_numpy(made.to_ndarray())
        turns = round((getattr(frame, "rotation", 0) or 0) / 90) % 4
        return torch.rot90(picture, turns).contiguous() if turns else picture
