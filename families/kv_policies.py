"""How a stream may remember its past, by the names users choose. Imports nothing: ComfyUI loads it at start."""

from __future__ import annotations

from ..checkpoints.checkpoint_error import shown

RECOMPUTE = "recompute"
ROLLING = "rolling"
# In the order of the node's menu.
KV_POLICIES = (RECOMPUTE, ROLLING)

# How keys and values of the past are stored.
KV_AUTO, KV_PLAIN, KV_FP8, KV_INT8 = KV_FORMATS = ("auto", "model's dtype", "FP8", "INT8")
KV_IN_8_BITS = (KV_FP8, KV_INT8)

# What a new prompt does to the keys of the past.
KEEP_KEYS, RECOMPUTE_KEYS = PROMPT_CHANGES = ("keep keys", "recompute keys")


def check_prompt_change(name: str) -> None:
    """Raise unless `name` is one of `PROMPT_CHANGES`.

    Raises:
        ValueError: with the allowed names.
    """
    if name not in PROMPT_CHANGES:
        raise ValueError(f"on_prompt_change is {shown(name)}: choose one of {', '.join(PROMPT_CHANGES)}.")


def check_kv_format(name: str) -> None:
    """Raise unless `name` is one of `KV_FORMATS`.

    Raises:
        ValueError: with the allowed names.
    """
    if name not in KV_FORMATS:
        raise ValueError(f"kv_format is {shown(name)}: choose one of {', '.join(KV_FORMATS)}.")


def check_kv_policy(name: str) -> None:
    """Raise unless `name` is one of `KV_POLICIES`.

    Raises:
        ValueError: with the allowed names.
    """
    if name not in KV_POLICIES:
        raise ValueError(f"kv_policy is {shown(name)}: choose one of {', '.join(KV_POLICIES)}.")
