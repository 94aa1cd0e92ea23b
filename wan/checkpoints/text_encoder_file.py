"""UMT5's encoder in one safetensors file, with transformers' names or Wan's own; its sizes are read off the shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from transformers import UMT5EncoderModel

from ...checkpoints.checkpoint_files import CheckpointError
from ...checkpoints.checkpoint_reading import read_checkpoint
from ...checkpoints.comfy_format import gather_quantized
from ...checkpoints.layer_numbers import count_layers
from ...checkpoints.module_loading import without_tied
from ...checkpoints.quantization_plan import ComponentWeights
from ...checkpoints.row_sources import QuantizedRows, RowSource
from .all_in_one import TEXT_ENCODER_NAMES, take_part
from .tokenizer import is_tokenizer

_EMBEDDING = "shared.weight"
_ORIGINAL_LAYER = re.compile(r"blocks\.([0-9]+)\.(.+)")
# Wan's names of a layer's parts, and what transformers calls them. Wan's feed-forward is gelu(gate.0 x) * fc1 x.
_PARTS = (
    ("attn.", "layer.0.SelfAttention."),
    ("pos_embedding.embedding.", "layer.0.SelfAttention.relative_attention_bias."),
    ("norm1.", "layer.0.layer_norm."),
    ("ffn.gate.0.", "layer.1.DenseReluDense.wi_0."),
    ("ffn.fc1.", "layer.1.DenseReluDense.wi_1."),
    ("ffn.fc2.", "layer.1.DenseReluDense.wo."),
    ("norm2.", "layer.1.layer_norm."),
)
_WHOLE_NAMES = {"token_embedding.weight": _EMBEDDING, "norm.weight": "encoder.final_layer_norm.weight"}


def recognise_text_encoder_file(path: Path) -> ComponentWeights:
    """Read the header of `path` and say which UMT5 encoder it holds; the config is that of `UMT5Config`.

    Weights that are stored in 8 bits with a scale stay so; products are computed in full precision, as ComfyUI does for
    text encoders.

    Raises:
        CheckpointError: the file cannot be read, is quantized in another format, or holds something else.
    """
    header = read_checkpoint(path)
    beside = {name: tensor for name, tensor in header.tensors.items() if not is_tokenizer(name)}
    prefix, tensors = take_part(path, beside, TEXT_ENCODER_NAMES)
    gathered = gather_quantized(path, header, tensors, prefix)
    named = {_transformers_name(name): _in_full_precision(source) for name, source in gathered.items()}
    sources = without_tied(named, dict(UMT5EncoderModel._tied_weights_keys))
    return ComponentWeights(path, _config_from_shapes(path, sources), sources)


def _transformers_name(name: str) -> str:
    layer = _ORIGINAL_LAYER.fullmatch(name)
    if layer is None:
        return _WHOLE_NAMES.get(name, name)
    number, part = layer.groups()
    for original, ours in _PARTS:
        if part.startswith(original):
            return f"encoder.block.{number}.{ours}{part.removeprefix(original)}"
    return name


def _in_full_precision(source: RowSource) -> RowSource:
    return replace(source, full_precision=True) if isinstance(source, QuantizedRows) else source


def _config_from_shapes(path: Path, sources: Mapping[str, RowSource]) -> dict[str, Any]:
    layers = count_layers(path, sources, "encoder.block.")
    attention = "encoder.block.0.layer.0.SelfAttention"
    if _EMBEDDING not in sources or not layers:
        raise CheckpointError(
            f"{path} holds no umt5 text encoder ({_EMBEDDING} or its layers are absent): choose a file such as "
            "umt5_xxl_fp8_e4m3fn_scaled.safetensors."
        )
    if layers > 1 and f"{attention.replace('.0.', '.1.', 1)}.relative_attention_bias.weight" not in sources:
        raise CheckpointError(
            f"{path} is a T5 encoder, whose layers share one position bias, and Wan needs umt5, where each has its "
            "own: choose a file such as umt5_xxl_fp8_e4m3fn_scaled.safetensors."
        )
    vocabulary, width = _matrix(path, sources, _EMBEDDING)
    buckets, heads = _matrix(path, sources, f"{attention}.relative_attention_bias.weight")
    inner, _ = _matrix(path, sources, f"{attention}.q.weight")
    feed_forward, _ = _matrix(path, sources, "encoder.block.0.layer.1.DenseReluDense.wi_0.weight")
    if not heads or inner % heads:
        raise CheckpointError(
            f"{path} has {heads} position biases and {inner} channels of queries, which must be a multiple: give the "
            "complete file of a umt5 text encoder."
        )
    return {
        "vocab_size": vocabulary,
        "d_model": width,
        "d_kv": inner // heads,
        "d_ff": feed_forward,
        "num_layers": layers,
        "num_heads": heads,
        "relative_attention_num_buckets": buckets,
        "feed_forward_proj": "gated-gelu",
    }


def _matrix(path: Path, sources: Mapping[str, RowSource], name: str) -> tuple[int, int]:
    shape = sources[name].shape if name in sources else None
    if shape is None or len(shape) != 2:
        raise CheckpointError(
            f"{path} has {'no' if shape is None else list(shape)} {name}, and a umt5 text encoder has it as a matrix: "
            "give the complete file."
        )
    return shape[0], shape[1]
