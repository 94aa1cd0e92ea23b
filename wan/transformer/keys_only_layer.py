"""A pass through the transformer that is made for its keys."""

from __future__ import annotations

import torch
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import nn

from .rope import RotaryTable
from .rotary_store import project_qkv, store_block


class KeysOnlyLayer(nn.Module):
    """Stands in for a transformer's last layer in a pass that is made for its keys: what lies behind them is left out.

    Attributes:
        layer: the layer, whose self-attention is bound to a pass.
    """

    def __init__(self, layer: WanTransformerBlock) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: torch.Tensor, text: torch.Tensor, modulation: torch.Tensor, rotary_emb: RotaryTable
    ) -> torch.Tensor:
        """Write keys and values; the hidden states come back as they are. Arguments as the layer's."""
        layer, attn = self.layer, self.layer.attn1
        # As the layer's own forward begins.
        shift, scale = (layer.scale_shift_table + modulation.float())[:, :2].chunk(2, dim=1)
        normed = (layer.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        store_block(attn, project_qkv(attn, normed), rotary_emb, attn.processor.bound)
        return hidden_states
