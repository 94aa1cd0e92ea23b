"""Which layers of a Wan pipeline are quantized, and why the others are not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType

from ...ops.layer_presets import LayerPreset

# The VAE has no preset: its convolutions determine every pixel, and it holds under 1 % of the weights.
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
            # transformers casts the input of T5's `wo` to the dtype of its weight, which in FP8 would destroy it.
            stays_in={"fp8": {r"\.DenseReluDense\.wo$": "wo in FP8: its input would be cast to the weight's dtype"}},
        ),
    }
)
