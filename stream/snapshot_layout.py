"""The layout of a snapshot, as JSON values that may come from anywhere."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..checkpoints.checkpoint_error import shown
from ..checkpoints.json_text import load_object

# The entry that says how many latent frames were made.
POSITION = "stream_position"
PLAIN = (bool, int, float, str)
_MOST_NODES, _DEEPEST, _MOST_FRAMES = 1_000_000, 40, 1 << 60
_SEQUENCES = ("list", "tuple", "deque")


def check_layout(written: str, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise ValueError unless `written`, which may come from anywhere, can be read with these tensors."""
    nodes = load_object(written)
    position = nodes.get(POSITION)
    if position is not None and not (type(position) is int and 0 <= position < _MOST_FRAMES):
        raise ValueError(f"the layout has the {POSITION} {shown(position)}")
    waiting: list[tuple[Any, int]] = [(node, 0) for node in nodes.values()]
    looked_at = 0
    while waiting:
        node, depth = waiting.pop()
        looked_at += 1
        if depth > _DEEPEST or looked_at > _MOST_NODES:
            raise ValueError("the layout is too large")
        waiting += [(below, depth + 1) for below in _below(node, tensors)]


def _below(node: Any, tensors: Mapping[str, torch.Tensor]) -> list[Any]:  # noqa: ANN401
    """The nodes in a node of a layout; raises ValueError for what is none."""
    if node is None or type(node) in PLAIN:
        return []
    keys = set(node) if isinstance(node, dict) else set()
    if keys == {"float"} and node["float"] in ("nan", "inf", "-inf"):
        return []
    if keys == {"tensor", "on_device"} and type(node["on_device"]) is bool and _named(node["tensor"], tensors):
        return []
    if keys == {"generator", "device"} and isinstance(node["device"], str) and _named(node["generator"], tensors):
        return []
    if keys == {"kind", "parts"} and isinstance(node["kind"], str) and isinstance(node["parts"], dict):
        return [node["parts"]]
    if keys == {"dict"} and isinstance(node["dict"], list):
        pairs = node["dict"]
        if all(isinstance(pair, list) and len(pair) == 2 and _is_key(pair[0]) for pair in pairs):
            return [pair[1] for pair in pairs]
    for kind in _SEQUENCES:
        wanted = {kind, "length"} if kind == "deque" else {kind}
        if keys == wanted and isinstance(node[kind], list) and _is_length(node.get("length")):
            return list(node[kind])
    raise ValueError(f"the layout has {shown(node)} in it")


def _is_key(key: Any) -> bool:  # noqa: ANN401
    return key is None or type(key) in PLAIN


def _is_length(length: Any) -> bool:  # noqa: ANN401
    return length is None or (type(length) is int and 0 <= length < 1 << 40)


def _named(name: Any, tensors: Mapping[str, torch.Tensor]) -> bool:  # noqa: ANN401
    return isinstance(name, str) and name in tensors


def tensors_named(node: Any) -> set[str]:  # noqa: ANN401
    """The names of tensors in a node of a layout, or in all of it."""
    if isinstance(node, list):
        return set().union(*map(tensors_named, node))
    if not isinstance(node, dict):
        return set()
    named = {name for kind in ("tensor", "generator") if isinstance(name := node.get(kind), str)}
    return named.union(*map(tensors_named, node.values()))
