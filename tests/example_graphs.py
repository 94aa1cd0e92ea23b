"""The graphs of `example_workflows/`: which nodes, where, with what typed into them, and their wires.

All but one run on a CPU in seconds, with the mini model that comes with the pack; sizes, steps and the like come from
the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

LOADER, QUANTIZE, SAMPLER = "StreamBlocksLoadPipeline", "StreamBlocksQuantizePipeline", "StreamBlocksSampler"
SAVE, REPORT, TRACK = "StreamBlocksSaveStream", "StreamBlocksMemoryReport", "StreamBlocksPromptTrack"


class Node(NamedTuple):
    """A node: its class, place and width in pixels, the widgets that differ from the schema's default, its title.

    Its height is what its widgets need, unless one is given.
    """

    type: str
    place: tuple[int, int]
    width: int
    widgets: Mapping[str, Any] = {}
    title: str = ""
    height: int = 0


class Wire(NamedTuple):
    """From node and output, to node and input; nodes by their number in the graph, slots by name or type."""

    origin: int
    output: str
    target: int
    input: str


@dataclass(frozen=True)
class Graph:
    """What is built in the page."""

    nodes: tuple[Node, ...]
    wires: tuple[Wire, ...]


def small_sampler(prompt: str = "a red circle moves right", *, seed: int = 6, blocks: int = 5) -> dict[str, Any]:
    """Widgets of a sampler that makes the same short video each time; with seed 6 the shape stays in the picture."""
    return {"prompt": prompt, "seed": seed, "control_after_generate": "fixed", "blocks": blocks}


def note(place: tuple[int, int], text: str, height: int = 280) -> Node:
    """What to look at, for the reader of the graph."""
    return Node("MarkdownNote", place, 420, {"text": text}, "About this workflow", height)


# Files as ComfyUI's users have them; the test lays their twins out.
SINGLE_FILES = {
    "model": "diffusion_models/self_forcing_dmd.pt",
    "vae": "vae/wan_2.1_vae.safetensors",
    "text_encoder": "text_encoders/umt5_xxl_fp8_e4m3fn_scaled.safetensors",
}
FOX = "a red fox runs through fresh snow, morning light, handheld camera, its breath visible in the cold air"

TEXT_TO_VIDEO = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(SAMPLER, (460, 120), 420, small_sampler()),
        Node(SAVE, (940, 120), 420),
    ),
    (Wire(0, "pipeline", 1, "pipeline"), Wire(1, "video", 2, "video")),
)
QUANTIZED = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(QUANTIZE, (440, 120), 340),
        Node(SAMPLER, (820, 120), 420, small_sampler()),
        Node(SAVE, (1280, 120), 420),
    ),
    (Wire(0, "pipeline", 1, "pipeline"), Wire(1, "pipeline", 2, "pipeline"), Wire(2, "video", 3, "video")),
)
FROM_SINGLE_FILES = Graph(
    (
        Node(LOADER, (60, 120), 420, SINGLE_FILES),
        Node(SAMPLER, (540, 120), 420, {"prompt": FOX}),
        Node(SAVE, (1020, 120), 420),
    ),
    (Wire(0, "pipeline", 1, "pipeline"), Wire(1, "video", 2, "video")),
)

TRACK_TEXT = """0: a red circle moves right
1->3: a blue circle moves right
5 cut: a green triangle moves left"""
ABOUT_TRACK = """## Prompts over time

The track takes the place of the sampler's own prompt. Here: a block of red, a transition to blue over blocks 1 to 3, \
and a **cut** at block 5, which begins a new scene.

All prompts are encoded before the first block. Times may be seconds, too: `2.5s-4s: fog`."""
PROMPT_TRACK = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(TRACK, (460, 120), 420, {"text": TRACK_TEXT}, "What happens when"),
        Node(SAMPLER, (940, 120), 420, small_sampler(blocks=6)),
        Node(SAVE, (1420, 120), 420),
        note((460, 420), ABOUT_TRACK),
    ),
    (Wire(0, "pipeline", 2, "pipeline"), Wire(1, "track", 2, "track"), Wire(2, "video", 3, "video")),
)

ABOUT_START = """## Begin with an image

The image is the first picture of the video, and the prompt says what happens next.

This one is drawn by ComfyUI's own nodes, in what the mini model knows: shapes in four colours. With a large model, \
connect **Load Image** to *start* instead; `fit` says what becomes of an image of another shape. Several images, or a \
video, are the past that the stream goes on from."""
START_IMAGE = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node("EmptyImage", (60, 520), 340, {"width": 64, "height": 64, "color": 0x0A0A0A}, "Black background"),
        Node("EmptyImage", (60, 720), 340, {"width": 20, "height": 20, "color": 0xEB1A1A}, "Red square"),
        Node("ImageCompositeMasked", (460, 520), 340, {"x": 10, "y": 22}, "The start image"),
        Node(SAMPLER, (860, 120), 420, small_sampler("a red square moves right", blocks=4)),
        Node(SAVE, (1340, 120), 420),
        note((1340, 700), ABOUT_START, 340),
    ),
    (
        Wire(0, "pipeline", 4, "pipeline"),
        Wire(1, "image", 3, "destination"),
        Wire(2, "image", 3, "source"),
        Wire(3, "image", 4, "start"),
        Wire(4, "video", 5, "video"),
    ),
)

ABOUT_VIDEO = """## Video to video

The second sampler makes each block from its part of the first one's video. It keeps the movement, and takes the \
colour from its own prompt. To use a video of yours, connect **Load Video**.

`strength` says how much is replaced: 0 gives the video back, 1 leaves nothing of it. The mini model's pictures are \
tiny and need **0.1**; large models at 832x480 want 0.3 to 0.8."""
VIDEO_TO_VIDEO = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(SAMPLER, (460, 120), 420, small_sampler(blocks=4), "The input: a red circle"),
        Node(
            SAMPLER, (940, 120), 420, small_sampler("a green circle moves right", seed=3, blocks=4) | {"strength": 0.1}
        ),
        Node(SAVE, (940, -500), 420, {"filename_prefix": "video/input"}, "Save the input"),
        Node(SAVE, (1420, 120), 420, {"filename_prefix": "video/made from it"}, "Save what was made from it"),
        note((1420, 700), ABOUT_VIDEO),
    ),
    (
        Wire(0, "pipeline", 1, "pipeline"),
        Wire(0, "pipeline", 2, "pipeline"),
        Wire(1, "video", 2, "video"),
        Wire(1, "video", 3, "video"),
        Wire(2, "video", 4, "video"),
    ),
)

ABOUT_GOING_ON = """## Go on

The second sampler goes on where the first one stopped, with another prompt and without a seam. The first one is not \
made again while only the second one changes.

With `same_video` on, the file holds both; off, only what is new. One stream may go into several samplers: try two \
endings of one beginning."""
GO_ON = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(SAMPLER, (460, 120), 420, small_sampler(blocks=3), "The beginning"),
        Node(
            SAMPLER,
            (940, 120),
            420,
            small_sampler("a blue square moves left", blocks=3) | {"same_video": True},
            "What comes next",
        ),
        Node(SAVE, (1420, 120), 420),
        note((1420, 700), ABOUT_GOING_ON),
    ),
    (
        Wire(0, "pipeline", 1, "pipeline"),
        Wire(0, "pipeline", 2, "pipeline"),
        Wire(1, "stream", 2, "go_on_from"),
        Wire(2, "video", 3, "video"),
    ),
)

ABOUT_SMALL_CARDS = """## A large model on a small card

1. **Quantize Pipeline** halves the weights while they are loaded.
2. What still does not fit stays in RAM, and is streamed to the card while the rest computes, with the same pictures. \
That happens by itself.
3. To leave room for other programs, set `memory_gb` on the sampler (under *advanced*): the GB that the stream may \
take, such as 8 or 12. Leave it at 0 on a computer without a card.
4. `kv_format` stores keys and values of past frames in 8 bits.

The report shows what held the memory; the sampler's *settings* output says how many layers stayed on the card."""
SMALL_CARD = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(QUANTIZE, (460, 120), 340),
        Node(SAMPLER, (860, 120), 420, small_sampler(blocks=8) | {"kv_format": "INT8"}),
        Node(SAVE, (1340, 120), 420),
        Node(REPORT, (1820, 120), 420),
        note((1340, 700), ABOUT_SMALL_CARDS, 420),
    ),
    (
        Wire(0, "pipeline", 1, "pipeline"),
        Wire(1, "pipeline", 2, "pipeline"),
        Wire(2, "video", 3, "video"),
        Wire(2, "timeline", 4, "timeline"),
    ),
)

ABOUT_REPORT = """## What holds the memory

**Stream Memory Report** draws who held how much, block by block, and says whether memory stayed flat. If something \
grows, it says what, and what to do.

The sampler's own chart shows the same while it runs."""
MEMORY_REPORT = Graph(
    (
        Node(LOADER, (60, 120), 340),
        Node(SAMPLER, (460, 120), 420, small_sampler(blocks=8)),
        Node(SAVE, (940, 120), 420),
        Node(REPORT, (1420, 120), 420),
        note((940, 700), ABOUT_REPORT, 220),
    ),
    (Wire(0, "pipeline", 1, "pipeline"), Wire(1, "video", 2, "video"), Wire(1, "timeline", 3, "timeline")),
)

FROM_PUBLISHED_FILES = "single_files"
EXAMPLE_GRAPHS = {
    "text_to_video_stream": TEXT_TO_VIDEO,
    "prompt_track": PROMPT_TRACK,
    "start_image": START_IMAGE,
    "video_to_video": VIDEO_TO_VIDEO,
    "go_on": GO_ON,
    "quantized_stream": QUANTIZED,
    "small_card": SMALL_CARD,
    "memory_report": MEMORY_REPORT,
    FROM_PUBLISHED_FILES: FROM_SINGLE_FILES,
}
