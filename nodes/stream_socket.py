"""The socket on which a stream travels from one sampler to another, and what a sampler asks about it."""

from __future__ import annotations

from comfy_api.latest import io

StreamType = io.Custom("STREAMBLOCKS_STREAM")


def going_on_inputs() -> list[io.Input]:
    """The sampler's inputs for a stream to continue."""
    return [
        StreamType.Input(
            "go_on_from",
            optional=True,
            tooltip=(
                "The stream output of another sampler: this one goes on where it stopped, without a seam. Prompt, "
                "steps, shift and LoRAs may change; inputs left at 0 are those of before, and the seed has no effect."
            ),
        ),
        io.Boolean.Input(
            "same_video",
            default=False,
            optional=True,
            tooltip="With go_on_from: the video begins with the earlier one, copied without loss.",
        ),
        io.Boolean.Input(
            "keep_stream",
            default=True,
            optional=True,
            advanced=True,
            tooltip=(
                "Keep in RAM what another sampler needs to go on, as the stream output: 1.9 GB at 832x480, and with "
                "rolling the keys of the past. Off: this stream cannot be continued."
            ),
        ),
    ]


def stream_output() -> io.Output:
    """The sampler's last output."""
    return StreamType.Output(display_name="stream", tooltip="For go_on_from of another sampler.")
