"""The attention processor that reads the prompt's keys and values from a cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.transformers.transformer_wan import WanAttention

from ...ops.few_key_attention import attend_by_frame, attend_to_few_keys
from ...ops.fp8_linear import QuantizedRows
from .attention_passes import CrossAttentionPass
from .rope import RotaryTable
from .rotary_store import as_one_sequence, split_heads

if TYPE_CHECKING:
    from .attention import CausalAttention


class CachedCrossAttnProcessor:
    """Cross-attention of one layer to the prompt's cached keys and values."""

    def __init__(self, causal: CausalAttention) -> None:
        self.causal = causal
        self.bound: CrossAttentionPass | None = None

    def __call__(
        self,
        attn: WanAttention,
        hidden_states: torch.Tensor | QuantizedRows,
        encoder_hidden_states: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        rotary_emb: RotaryTable | None = None,
    ) -> torch.Tensor | QuantizedRows:
        """Attend; hidden_states [batch, tokens, dim] in and out."""
        bound = self.bound
        if bound is not None and bound.writes_text:
            key, value = _project_text(attn, encoder_hidden_states)
            bound.keys.copy_(key)
            bound.values.copy_(value)
            return hidden_states
        groups = None
        if bound is not None:
            # The prompt's keys are those of one sequence.
            hidden_states, groups = as_one_sequence(hidden_states)
        query = split_heads(attn.norm_q(attn.to_q(hidden_states)), attn.heads)
        if bound is None:
            bound = CrossAttentionPass(*_project_text(attn, encoder_hidden_states))
        if bound.frame_tokens and bound.few is not None:
            attended = attend_by_frame(query, bound.keys, bound.values, bound.few, bound.frame_tokens, bound.kernel)
        elif bound.few is not None:
            attended = attend_to_few_keys(query, bound.keys, bound.values, bound.few, bound.kernel)
        else:
            attended = dispatch_attention_fn(query, bound.keys, bound.values, backend=self.causal.backend)
        made = attn.to_out[1](attn.to_out[0](attended.flatten(2, 3).type_as(query)))
        return made if groups is None else made.view(groups, -1, made.shape[-1])


def _project_text(attn: WanAttention, text: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values [batch, text tokens, heads, head_dim] of embedded text [batch, text tokens, dim]."""
    if text is None:
        raise ValueError("encoder_hidden_states is None: cross-attention needs the text or its cache.")
    key = split_heads(attn.norm_k(attn.to_k(text)), attn.heads)
    return key, split_heads(attn.to_v(text), attn.heads)
