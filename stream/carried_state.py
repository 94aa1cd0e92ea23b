"""Which entries of a stream's state the next block needs, when another session makes it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..families.kv_policies import RECOMPUTE
from ..memory.cleanup import DEFAULT_HANDLING, Handling
from .settings import INPUT_NAMES, StreamSettings
from .state import Snapshottable

# What the decoder has decoded last, where it stands for the decoder's own cache; see `DecodedLatents`.
DECODED_LATENTS = "decoded_latents"
# Made anew of it.
DECODER_CACHE = "decoder_cache"
# What the built-in blocks find in the state and cannot make anew. The prompt's embeddings and keys can be, from the
# prompt; schedule and noise belong to one block.
CARRIED = frozenset(
    {
        "stream_position",
        "current_denoised_latents",
        "frame_cache_context",
        DECODER_CACHE,
        DECODED_LATENTS,
        "sink_latents",
        "kv_cache",
        "generator",
    }
)
# Of the input video; carried as the object it is, and of use only where the video goes on, too.
INPUT_ENCODER = "input_encoder"
# The session gives these with every call, as the settings and the prompt of then say.
_GIVEN_ANEW = frozenset({*INPUT_NAMES.values(), "prompt", "block_idx"})


def carried_by_built_in_blocks(state: Mapping[str, Any], settings: StreamSettings) -> dict[str, Any]:
    """Entries of a state of the built-in blocks; keys and values only where they cannot be computed bitwise again.

    Under "recompute" each block computes them from the context's latents. Under "rolling" those of the window were
    computed by blocks that saw what has left it. Any other object that is `Snapshottable` is carried, too.
    """
    computed_again = {"kv_cache"} if settings.kv_policy == RECOMPUTE else set()
    return {
        key: value
        for key, value in state.items()
        if value is not None and key not in computed_again and (key in CARRIED or isinstance(value, Snapshottable))
    }


def carried_by_unknown_blocks(
    state: Mapping[str, Any], handling: Mapping[str, Handling], taken_inputs: Collection[str]
) -> dict[str, Any]:
    """All entries that blocks of a repository find in the state, as the table says, and do not get with the call."""
    given = _GIVEN_ANEW & set(taken_inputs)
    return {
        key: value
        for key, value in state.items()
        if handling.get(key, DEFAULT_HANDLING) is not Handling.DROP and key not in given
    }
