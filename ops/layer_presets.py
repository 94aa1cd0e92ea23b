"""Which layers of each component are quantized, and why the others stay."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class LayerPreset:
    """Which layers of a component are quantized, and why the others stay.

    Attributes:
        quantized: full-match pattern of the layer names to quantize.
        stays: search pattern to reason, first match counts.
        otherwise: the reason for layers that no pattern knows.
    """

    quantized: re.Pattern[str]
    stays: Mapping[str, str]
    otherwise: str


PRESETS: Mapping[str, LayerPreset] = MappingProxyType(
    {
        "transformer": LayerPreset(
            re.compile(r"blocks\.\d+\.(attn[12]\.(to_q|to_k|to_v|to_qkv|to_kv|to_out\.0)|ffn\.net\.(0\.proj|2))"),
            MappingProxyType(
                {
                    r"^patch_embedding": "patch embedding: every token comes through it, and it is tiny",
                    r"time_embedder|time_proj": "time embedding: drives the modulation of every layer",
                    r"text_embedder": "text embedding: runs once per prompt and feeds every cross-attention",
                    r"scale_shift_table|modulation": "modulation: scales whole layers",
                    r"norm": "norm: scales every channel, and it is tiny",
                    r"^proj_out": "head: its error goes straight into the picture",
                }
            ),
            "not an attention or feed-forward layer of a block",
        ),
        "text_encoder": LayerPreset(
            re.compile(r"encoder\.block\.\d+\.layer\.\d+\.(SelfAttention\.[qkvo]|DenseReluDense\.(wi(_[01])?|wo))"),
            MappingProxyType(
                {
                    r"shared|embed_tokens": "token embedding: a table, not a matrix product",
                    r"relative_attention_bias": "position bias: a table, not a matrix product",
                    r"norm": "norm: scales every channel, and it is tiny",
                }
            ),
            "not an attention or feed-forward layer of the encoder",
        ),
    }
)
# transformers casts the input of T5's `wo` to the dtype of its weight, which in FP8 would destroy it.
_FP8_WO = re.compile(r".*\.DenseReluDense\.wo")


def reason_to_stay(name: str, format_: str, component: str) -> str:
    """Why the layer `name` of `component` is not quantized to `format_`; empty when it is."""
    preset = PRESETS[component]
    if not preset.quantized.fullmatch(name):
        known = (reason for pattern, reason in preset.stays.items() if re.search(pattern, name))
        return next(known, preset.otherwise)
    if format_ == "fp8" and _FP8_WO.fullmatch(name):
        return "wo in FP8: transformers would cast its input to the weight's dtype"
    return ""
