"""The rungs of a session's memory ladder, mildest first."""

from __future__ import annotations

import logging
from typing import Protocol

from .decode_bounds import ways_of_decoding
from .memory_ladder import Rung, Shortage
from .memory_saving import MemorySaving
from .settings import StreamSettings
from .state import StreamState

logger = logging.getLogger(__name__)

# Their ids, which nodes have messages for.
FREED, OTHER_MODELS, OTHER_PARTS, DECODING, LAYERS, KEYS = RUNGS = (
    "freed",
    "other models out",
    "other parts out",
    "decoded in parts",
    "more layers streamed",
    "keys in 8 bits",
)

# What a stage that decodes pictures takes, by which it is known.
DECODES = frozenset({"decode_bands"})


class Adjustable(Protocol):
    """A session, as far as rungs change it."""

    settings: StreamSettings

    @property
    def state(self) -> StreamState:
        """Between two calls of the saving."""


def rungs_of(saving: MemorySaving, session: Adjustable) -> tuple[Rung, ...]:
    """All of them; each says for itself whether it is possible."""

    def free(shortage: Shortage) -> str:
        # The rest of what is cached is freed between two tries anyway.
        saving.drop_graphs(for_good=True)
        return "cached memory was freed and the work done again"

    def unload_other_models(shortage: Shortage) -> str:
        return "ComfyUI's other models were unloaded" if saving.offload_other_models() else ""

    def unload_other_parts(shortage: Shortage) -> str:
        parts = " and ".join(saving.offload_unused(of_text=shortage.of_text)).replace("_", " ")
        return f"{parts} left the device" if parts else ""

    def decode_in_parts(shortage: Shortage) -> str:
        changed = saving.bound_decoding(session.settings) if shortage.takes >= DECODES else None
        if changed is None:
            return ""
        session.settings = changed
        return f"pictures are decoded {ways_of_decoding(changed)} from there on, the same but for rounding"

    def stream_more_layers(shortage: Shortage) -> str:
        try:
            more = saving.stream_more_layers(of_text=shortage.of_text)
        except (MemoryError, OSError) as error:
            logger.warning("no more layers can be streamed: %s", error)
            return ""
        return (
            f"more layers of the {'text encoder' if shortage.of_text else 'transformer'} are streamed" if more else ""
        )

    def pack_keys(shortage: Shortage) -> str:
        changed = saving.pack_keys(session.settings, session.state.values) if shortage.went_back else None
        if changed is None:
            return ""
        session.settings = changed
        return "keys of the past are kept in 8 bits from there on, and pictures differ slightly from those without"

    takes = (free, unload_other_models, unload_other_parts, decode_in_parts, stream_more_layers, pack_keys)
    return tuple(Rung(name, take, once=name in RUNGS[:3]) for name, take in zip(RUNGS, takes, strict=True))
