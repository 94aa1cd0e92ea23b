"""What a checkpoint says about whether its transformer was trained to see only the past.

The tensors of both kinds have the same names and shapes. Only these say that one is causal: ComfyUI's field
`causal_ar` in a header's `config`, the class and keys of a config, and the nestings of distillation's training
checkpoints. That one is not causal can only be known by the names under which Wan 2.1's own models are published.
"""

from __future__ import annotations

import re
from pathlib import Path

from ...checkpoints.checkpoint_error import CheckpointError
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.json_text import parse_json
from ...checkpoints.quantization_plan import ComponentWeights
from .transformer_configs import FRAMES_PER_BLOCK_KEYS

# Names in full, so that a finetune's name, which adds a word, does not match: Comfy-Org's and Kijai's files, the
# makers' folders, and words for the format.
_PUBLISHED = re.compile(
    r"wan_?2[._]1[-_]t2v[-_](?:1[._]3b|14b)"
    r"(?:[-_](?:diffusers|bf16|fp16|fp32|fp8|scaled|e4m3fn|e5m2|comfyui|repackaged))*",
    re.IGNORECASE,
)
_HUB_FOLDER = re.compile(r"models--[^/]*--([^/]+)")
_CAUSAL_KEYS = (*FRAMES_PER_BLOCK_KEYS, "local_attn_size", "sink_size", "causal_ar")


def causality_notice(weights: ComponentWeights) -> str | None:
    """What to expect of a model that was trained to see all frames at once; None unless it is known to be one.

    A LoRA may make such a model causal, so with one nothing is said.
    """
    name = _published_name(weights.path)
    if name is None or weights.loras or _says_causal(weights):
        return None
    return (
        f"{name} is a model that was trained to see all frames at once, with 50 steps and guidance, and a stream shows "
        "it only the past, with few steps and none: expect blurred pictures that drift, or use a checkpoint or LoRA "
        "made for streams, such as Self-Forcing."
    )


def _published_name(path: Path) -> str | None:
    """The name under which the makers' own model lies here: of the file or folder, or of the hub's cache around it."""
    names = [path.name if path.is_dir() else path.stem]
    names += [match[1] for match in map(_HUB_FOLDER.fullmatch, path.parts) if match]
    return next((name for name in names if _PUBLISHED.fullmatch(name)), None)


def _says_causal(weights: ComponentWeights) -> bool:
    config = weights.config
    if "causal" in str(config.get("_class_name", "")).lower() or any(key in config for key in _CAUSAL_KEYS):
        return True
    if weights.path.is_dir():
        return False
    header = read_checkpoint(weights.path)
    return _header_says_causal(header.metadata.get("config")) or any("generator" in key for key in header.tensors)


def _header_says_causal(text: str | None) -> bool:
    """Whether the header's field `config` is ComfyUI's word for causal; what is no JSON says nothing."""
    try:
        transformer = parse_json(text or "{}", "config").get("transformer")
    except CheckpointError:
        return False
    return isinstance(transformer, dict) and bool(transformer.get("causal_ar"))
