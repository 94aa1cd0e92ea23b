"""What a user sets on the Streaming Block Sampler about saving a stream while it runs, and going on with it."""

from __future__ import annotations

from comfy_api.latest import io

# A few seconds of a fast stream, and some tens of megabytes each time.
SAVE_EVERY = 10
NEW_STREAM, RESUME_LAST = RESUME_CHOICES = ("new stream", "this node's unfinished stream, if there is one")


def saving_inputs() -> list[io.Input]:
    """What came after the others: saved workflows know inputs by their order."""
    return [
        io.Int.Input(
            "save_every",
            default=SAVE_EVERY,
            min=0,
            max=1_000_000,
            optional=True,
            advanced=True,
            tooltip=(
                "Blocks between two saves to the output folder's streamblocks/unfinished, from which the stream can go "
                "on after a crash or a cancel; 0: never. A save takes about 40 MB at 832x480, with rolling the keys of "
                "the window too (gigabytes), and with a video about 1 GB more; where saves would take more than a "
                "twentieth of the time, there are fewer. All of it goes when the stream is finished."
            ),
        ),
        io.Combo.Input(
            "resume",
            options=list(RESUME_CHOICES),
            default=NEW_STREAM,
            optional=True,
            tooltip=(
                "After a crash, a cancel or an error: go on with the unfinished stream of this node as if it had never "
                "stopped, with the prompts that it had. Where it has none, a new stream begins."
            ),
        ),
    ]
