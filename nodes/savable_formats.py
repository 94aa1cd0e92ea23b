"""Which quantizations Save Quantized Model can write, and whether a prompt asks it for another."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

QUANTIZE_NODE, SAVE_NODE = "StreamBlocksQuantizePipeline", "StreamBlocksSaveQuantizedModel"
# ComfyUI's FP8 format has one scale a tensor.
_UNSAVABLE = ("fp8", "per row")


def check_savable(format: str, weight_granularity: str) -> None:
    """Refuse weights that ComfyUI's quantized format cannot store; raises ValueError."""
    if (format, weight_granularity) == _UNSAVABLE:
        raise ValueError(
            f"weight_granularity is '{weight_granularity}', which ComfyUI's FP8 format cannot store: choose 'per "
            "tensor' in Quantize Pipeline, or take Save Quantized Model out of the workflow."
        )


def check_saved_formats(prompt: Mapping[str, Any] | None) -> None:
    """Refuse a prompt in which Save Quantized Model will fail, before another node has worked for it.

    Args:
        prompt: in ComfyUI's API format; None outside of one. Values from other nodes are not known yet, and pass.

    Raises:
        ValueError: a quantization that is saved cannot be.
    """
    for node_id, node in (prompt or {}).items():
        if node.get("class_type") == SAVE_NODE:
            for inputs in _quantizations_before(node_id, prompt or {}):
                check_savable(str(inputs.get("format")), str(inputs.get("weight_granularity")))


def _quantizations_before(node_id: str, prompt: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The inputs of the Quantize Pipeline nodes that a node's links lead back to."""
    seen, waiting = {node_id}, [node_id]
    while waiting:
        node = prompt[waiting.pop()]
        if node.get("class_type") == QUANTIZE_NODE:
            yield node["inputs"]
            continue
        for value in node.get("inputs", {}).values():
            # A link is [node id, slot].
            if isinstance(value, list) and len(value) == 2 and str(value[0]) in prompt and str(value[0]) not in seen:
                seen.add(str(value[0]))
                waiting.append(str(value[0]))
