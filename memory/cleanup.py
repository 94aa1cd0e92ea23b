"""What happens to each entry of a pipeline's state between two blocks, and when memory goes back to the card."""

from __future__ import annotations

import gc
from collections.abc import Iterable, Mapping, MutableMapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch


class Handling(str, Enum):
    """What the stream does with a state entry before the next `pipe()` call."""

    DROP = "drop"
    SHARE = "share"
    COPY = "copy"


@dataclass(frozen=True)
class StateRule:
    """One line of the table: a key of `PipelineState.values`, what is done with it, and why."""

    key: str
    handling: Handling
    reason: str


STATE_RULES: tuple[StateRule, ...] = (
    StateRule("videos", Handling.DROP, "the block's pictures; the sinks have them"),
    StateRule("video", Handling.DROP, "input video of the block just made"),
    StateRule("video_stream", Handling.DROP, "input frames of the block just made"),
    StateRule("input_pictures", Handling.DROP, "input pictures of the block just made"),
    StateRule("input_latents", Handling.DROP, "of the input pictures of the block just made"),
    StateRule("input_encoder", Handling.SHARE, "carries the VAE's temporal convolutions across the input's seams"),
    StateRule("show_pictures", Handling.DROP, "whom pictures of the block just made were shown to"),
    StateRule("pictures_finite", Handling.DROP, "of the block just made; the session has checked it"),
    StateRule("latents", Handling.DROP, "noise, then result, of the block just made"),
    StateRule(
        "kv_cache", Handling.SHARE, "past keys and values, and a block whose keys are deferred; changed in place"
    ),
    StateRule("crossattn_cache", Handling.SHARE, "the prompt's keys and values; refilled in place"),
    StateRule("decoder_cache", Handling.SHARE, "carries the VAE's temporal convolutions across the seam"),
    StateRule("decoded_latents", Handling.SHARE, "of a snapshot: what the decoder is made anew of"),
    StateRule("frame_cache_context", Handling.SHARE, "pictures the first context latent is re-encoded from"),
    StateRule("current_denoised_latents", Handling.SHARE, "context latents of the next block"),
    StateRule("sink_latents", Handling.SHARE, "first frames of the stream, whose keys stay in a window"),
    StateRule("next_block_idx", Handling.SHARE, "tells a stream that starts again from one that goes on"),
    StateRule("stream_position", Handling.SHARE, "latent frames before the next block: the stream's place in time"),
    StateRule("keys_are_stale", Handling.SHARE, "set when a prompt has gone; the pipeline resets it"),
    StateRule("prompt_embeds", Handling.SHARE, "valid until the prompt changes"),
    StateRule("generator", Handling.SHARE, "a copy would repeat the noise"),
)

# Entries that the table does not name are shared: a pipeline put them there for its next call, and a reference
# costs nothing.
DEFAULT_HANDLING = Handling.SHARE


def handling_table(extra: Iterable[StateRule] = ()) -> dict[str, Handling]:
    """The table by key; `extra` rules (a foreign pipeline's) replace those of the same key."""
    return {rule.key: rule.handling for rule in (*STATE_RULES, *extra)}


_LONGEST_RULES = 100_000
_SHOWN_LETTERS = 80


def parse_state_rules(text: str) -> tuple[StateRule, ...]:
    """Read rules a user wrote, one `key = drop`, `key = share` or `key = copy` a line; `#` starts a comment.

    Raises:
        ValueError: a line is not of that form.
    """
    if len(text) > _LONGEST_RULES:
        raise ValueError(f"state_rules has {len(text)} letters: write up to {_LONGEST_RULES}.")
    rules = []
    for line in text.splitlines():
        content = line.partition("#")[0].strip()
        if not content:
            continue
        key, separator, handling = (part.strip() for part in content.partition("="))
        choices = [choice.value for choice in Handling]
        if not separator or not key or handling not in choices:
            raise ValueError(
                f"state rule {content[:_SHOWN_LETTERS]!r} is not understood: write 'key = {' | '.join(choices)}'."
            )
        rules.append(StateRule(key, Handling(handling), "set by the user"))
    return tuple(rules)


def strip_state(values: MutableMapping[str, Any], table: Mapping[str, Handling]) -> list[str]:
    """Remove the entries that are consumed; returns their keys."""
    dropped = [key for key in values if table.get(key, DEFAULT_HANDLING) is Handling.DROP]
    for key in dropped:
        del values[key]
    return dropped


class CleanupPolicy(str, Enum):
    """When memory that torch has cached goes back to the card."""

    WHEN_IT_PAYS = "when it pays"
    EVERY_BLOCK = "every block"
    NEVER = "never"


# Share of the card's memory that may be reserved but unused before a clean-up is worth its stall.
UNUSED_SHARE_LIMIT = 0.15


@dataclass(frozen=True)
class CardMemory:
    """Bytes of a card: in all, free, reserved by torch's allocator, and of those in use by tensors."""

    total: int
    free: int
    reserved: int
    allocated: int

    @property
    def unused(self) -> int:
        """Reserved by torch's allocator and not in use."""
        return self.reserved - self.allocated


def read_card_memory(device: torch.device) -> CardMemory | None:
    """Memory of a CUDA card; None for devices without such counters (CPU, MPS)."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return CardMemory(
        total=total,
        free=free,
        reserved=torch.cuda.memory_reserved(device),
        allocated=torch.cuda.memory_allocated(device),
    )


def cleanup_pays(memory: CardMemory) -> bool:
    """Whether unused reserved memory is a large share of the card; a smaller share the allocator reuses by itself."""
    return memory.unused > UNUSED_SHARE_LIMIT * memory.total


def clean_up_after_block(policy: CleanupPolicy, device: torch.device) -> bool:
    """Give cached memory back if the policy says so.

    Args:
        policy: the user's choice.
        device: the stream's device.

    Returns:
        Whether memory was given back.
    """
    if policy is CleanupPolicy.NEVER:
        return False
    memory = read_card_memory(device)
    if policy is CleanupPolicy.WHEN_IT_PAYS and (memory is None or not cleanup_pays(memory)):
        return False
    release_cached_memory(device)
    return True


def release_cached_memory(device: torch.device) -> None:
    """Collect garbage and empty torch's cache of the device, after a synchronize on CUDA."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    elif device.type == "xpu":
        torch.xpu.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
