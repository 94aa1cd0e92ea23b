"""What a user sets on the Streaming Block Sampler about the run: memory, pictures kept, caches."""

from __future__ import annotations

from comfy_api.latest import io

from ..memory.cleanup import CleanupPolicy
from ..stream.keep_frames import KeepFrames

TIMELINE_ON, TIMELINE_EXACT, TIMELINE_OFF = TIMELINE_MODES = ("on", "exact", "off")


def run_inputs() -> list[io.Input]:
    """What happens beside the stream."""
    return [
        io.Combo.Input(
            "cleanup",
            options=[policy.value for policy in CleanupPolicy],
            default=CleanupPolicy.WHEN_IT_PAYS.value,
            advanced=True,
            tooltip=(
                "When torch's cached memory returns to the device. 'when it pays' waits until much of it is "
                "unused; 'every block' costs speed."
            ),
        ),
        io.Combo.Input(
            "keep_frames",
            options=[choice.value for choice in KeepFrames],
            default=KeepFrames.LAST_BLOCK.value,
            advanced=True,
            tooltip=(
                "Which pictures the IMAGE output holds. 'all' needs RAM for the whole video; the mp4 "
                "always has all of them."
            ),
        ),
        io.Combo.Input(
            "memory_timeline",
            options=list(TIMELINE_MODES),
            default=TIMELINE_ON,
            advanced=True,
            tooltip=(
                "Records what holds the memory, for the chart and Stream Memory Report. 'on' costs under 1 % "
                "of a block. 'exact' counts every live tensor where the device has no counters (CPU): slow."
            ),
        ),
        io.Boolean.Input(
            "reset_compile",
            default=False,
            advanced=True,
            tooltip=(
                "Clear torch.compile's caches when the stream is over. The next stream compiles again; the "
                "memory is rarely worth that time unless sizes change often."
            ),
        ),
    ]
