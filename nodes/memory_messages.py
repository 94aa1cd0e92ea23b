"""What a node says when its stream's device runs out of memory."""

from __future__ import annotations

from .. import host
from ..stream.memory_rungs import DECODING, KEYS, LAYERS, OTHER_MODELS, OTHER_PARTS


def say_rung(progress: host.StreamProgress, block: int, rung: str) -> None:
    """Say what was done so that block `block`, from 0, can be made after all."""
    shown = block + 1
    if rung == OTHER_MODELS:
        progress.say("memory_other_models", block=shown)
    elif rung == OTHER_PARTS:
        progress.say("memory_other_parts", block=shown)
    elif rung == DECODING:
        progress.say("memory_decoding", block=shown)
    elif rung == LAYERS:
        progress.say("memory_layers", block=shown)
    elif rung == KEYS:
        progress.say("memory_keys", block=shown)
    else:
        progress.say("memory_freed", block=shown)
