"""The prompt of streams that are killed and resumed, and the video that some of them are made from."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np

LOADER, SAMPLER, SAVER = "StreamBlocksLoadPipeline", "StreamBlocksSampler", "StreamBlocksSaveStream"
MODEL = "diffusers/tiny"
# Key of the node with the input video.
VIDEO = "5"
# Policy, and whether there is an input video.
SCENARIOS = [(policy, video) for video in (False, True) for policy in ("recompute", "rolling")]
NEW, RESUMED = "new stream", "this node's unfinished stream, if there is one"
BLOCKS, SEED = 20, 5


def defaults_of(required: Mapping[str, Any]) -> dict[str, Any]:
    """The default values of a node's inputs that have one, by what ComfyUI says of them."""
    given = {name: spec[1] if len(spec) > 1 else {} for name, spec in required.items()}
    return {name: options["default"] for name, options in given.items() if "default" in options}


def prompt_of(request: Mapping[str, Any], defaults: Callable[[str], Mapping[str, Any]]) -> dict[str, Any]:
    """The prompt of a request, but for the node with its input video.

    Args:
        request: with `name`, `policy`, `video`, `blocks`, `seed`, `save_every` and `resume`.
        defaults: the default values of a node's inputs, by its class.
    """
    sampler = {
        **defaults(SAMPLER),
        "pipeline": ["1", 0], "prompt": "a red circle", "seed": request["seed"], "blocks": request["blocks"],
        "width": 32, "height": 32, "steps": 2, "shift": 0, "kv_policy": request["policy"], "context_frames": 0,
        "sink_frames": -1, "attention_bias": 0, "fps": 0, "cleanup": "never", "keep_frames": "none",
        "memory_timeline": "off", "keep_stream": False, "save_every": request["save_every"],
        "resume": request["resume"], "strength": 0.7,
    }  # fmt: skip
    if request["video"]:
        sampler["video"] = [VIDEO, 0]
    loader = {**defaults(LOADER), "model": MODEL, "dtype": "float32", "device": "cpu"}
    return {
        "1": {"class_type": LOADER, "inputs": loader},
        "3": {"class_type": SAMPLER, "inputs": sampler},
        "4": {"class_type": SAVER, "inputs": {"video": ["3", 0], "filename_prefix": f"made/{request['name']}"}},
    }


def write_input(path: Path) -> None:
    """A video of moving noise, shorter than the stream, so that it begins again."""
    generator = np.random.default_rng(1)
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("libx264", rate=12)
        stream.width, stream.height, stream.pix_fmt = 48, 32, "yuv420p"
        picture = generator.integers(0, 255, (32, 48, 3), dtype=np.uint8)
        for index in range(70):
            frame = av.VideoFrame.from_ndarray(np.roll(picture, index, axis=1).copy(), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def decoded_digests(video: str | Path) -> list[str]:
    """A digest of each picture of a file, as it is decoded; none where two do not follow each other at one rate."""
    with av.open(str(video)) as container:
        frames = list(container.decode(video=0))
    # A block that is in it twice, or a gap, shows in the times.
    steps = {(later.pts or 0) - (earlier.pts or 0) for earlier, later in pairwise(frames)}
    if len(steps) != 1:
        return []
    return [hashlib.sha256(frame.to_ndarray(format="yuv420p").tobytes()).hexdigest() for frame in frames]


def differences(name: str, video: str | Path | None, wanted: list[str]) -> list[str]:
    """A sentence for each thing that is wrong with the finished file of a stream.

    Args:
        name: of the stream.
        video: the file; None or "" where there is none.
        wanted: digests of the pictures of the stream that was never stopped.
    """
    found = decoded_digests(video) if video else []
    if len(found) != len(wanted):
        return [f"{name}: the video has {len(found)} pictures and should have {len(wanted)}"]
    wrong = [index for index, (one, other) in enumerate(zip(found, wanted, strict=True)) if one != other]
    return [f"{name}: {len(wrong)} pictures of the video differ, first picture {wrong[0]}"] if wrong else []
