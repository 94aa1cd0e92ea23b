"""The sampler's inputs for pictures: a start, and a video, or live pictures, that each block is made from."""

from __future__ import annotations

from comfy_api.latest import io

from ..stream.picture_choices import FITS, MIDDLE_STRENGTH, VIDEO_ENDS
from .live_input import LiveType


def picture_inputs() -> list[io.Input]:
    """Inputs that workflows of earlier versions do not have."""
    return [
        io.MultiType.Input(
            "start",
            [io.Image, io.Video],
            optional=True,
            tooltip=(
                "Pictures that the video goes on from. One image is its first picture; of several, or of a video, the "
                "last ones are its past, and only what comes after them is made."
            ),
        ),
        io.Video.Input(
            "video",
            optional=True,
            tooltip=(
                "Video to video: each block is made from its part of this one, whose sound is kept. A file is read "
                "while the stream runs, so it may be as long as you like."
            ),
        ),
        io.Float.Input(
            "strength",
            default=MIDDLE_STRENGTH,
            min=0.0,
            max=1.0,
            step=0.01,
            optional=True,
            tooltip=(
                "How much of 'video' is replaced. 0 gives the video back, 1 leaves nothing of it; in between, the "
                "prompt decides on colours first, then on shapes and movement. So, too, with 'live'; without either it "
                "has no effect."
            ),
        ),
        io.Combo.Input(
            "fit",
            options=list(FITS),
            default=FITS[0],
            optional=True,
            advanced=True,
            tooltip=(
                "For 'start' and 'video' of another shape: crop cuts off what does not fit, equally on both sides; pad "
                "adds black."
            ),
        ),
        io.Combo.Input(
            "video_end",
            options=list(VIDEO_ENDS),
            default=VIDEO_ENDS[0],
            optional=True,
            advanced=True,
            tooltip=(
                "What follows where 'video' is shorter than the stream: loop begins it again, hold repeats its last "
                "picture, stop ends the stream."
            ),
        ),
    ]


def live_inputs() -> list[io.Input]:
    """What came after the others: saved workflows know inputs by their order."""
    return [
        LiveType.Input(
            "live",
            optional=True,
            tooltip=(
                "From Stream Live Input: each block is made from the newest pictures of your camera, as from 'video', "
                "with 'strength' and 'fit'. They have no end, so switch on 'endless', or say how long."
            ),
        ),
    ]
