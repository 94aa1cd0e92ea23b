"""Wan's own parameter names from diffusers' ones, the inverse of diffusers' renaming."""

from __future__ import annotations

# Tried in this order; the first match in a name is replaced. A name matches at most once, except for attention, where
# the block's part is replaced first and the projection's second.
_HEADS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("scale_shift_table", "head.modulation"),
)
_PARTS = (
    (".scale_shift_table", ".modulation"),
    (".attn1.", ".self_attn."),
    (".attn2.", ".cross_attn."),
    (".to_out.0", ".o"),
    (".to_q", ".q"),
    (".to_k", ".k"),
    (".to_v", ".v"),
    (".norm2", ".norm3"),
    (".ffn.net.0.proj", ".ffn.0"),
    (".ffn.net.2", ".ffn.2"),
)


def original_name(name: str) -> str:
    """Wan's name of the text-to-video transformer parameter or layer that diffusers calls `name`.

    `blocks.0.attn1.to_k.weight` is `blocks.0.self_attn.k.weight`; names that both share are returned unchanged.
    Fused projections have no original name: unfuse first.
    """
    for ours, wans in _HEADS:
        if name == ours or name.startswith(ours + "."):
            return wans + name.removeprefix(ours)
    for ours, wans in _PARTS:
        name = name.replace(ours, wans)
    return name
