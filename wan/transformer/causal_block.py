"""The transformer's layer, with passes that run only a part of it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel, WanTransformerBlock

from ...ops.compile_settings import share_graphs
from .fused_norms import LayerNorms, norm_for_self_attention, run_layer
from .rope import RotaryTable

# Where dynamo finds `SelfAttentionPass.past` in a layer. Kernels take it as a number, and no shape but that of the keys
# that are read depends on it.
_PAST = r".*\['attn1'\]\.processor\.bound\.past"


def settings_for_layers(transformer: WanTransformer3DModel) -> AbstractContextManager[None]:
    """Around a pass: where layers are compiled, one graph serves every length of the past."""
    is_compiled = transformer.blocks[0]._compiled_call_impl is not None
    return share_graphs(_PAST) if is_compiled else nullcontext()


class CausalWanBlock(WanTransformerBlock):
    """diffusers' layer; diffusers' forward runs every ordinary pass, compiled or not, unless its norms have a kernel.

    The pass bound to the attention processors decides what a call does: an ordinary pass, the last layer's part of a
    keys-only pass (`CausalPass.keys_only`), or the keys and values of a prompt (`CrossAttentionPass.writes_text`). Each
    goes through the layer's own call, so forward hooks fire for each of them. `install_causal_attention` gives
    layers this class; weights and names stay as they are.

    Only the ordinary pass is compiled: the other two run once per block or per prompt, and would add a graph for each
    shape. Hooks run outside the compiled code: adding or removing one does not trigger recompilation, and a hook may
    do what cannot be traced, such as moving weights.
    """

    def __call__(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # noqa: ANN401
        """Run the hooks, and `forward` between them."""
        # Not `nn.Module.__call__`, which would call the compiled code directly and skip the hooks and `forward`.
        made: torch.Tensor = self._call_impl(*args, **kwargs)
        return made

    def compile(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Compile the ordinary pass; arguments as those of `torch.compile`."""
        # The attribute in which `nn.Module` keeps its compiled call. It is left out of copies and pickles, which must
        # not call back into this layer.
        self._compiled_call_impl = torch.compile(self._run, *args, **kwargs)

    def forward(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: RotaryTable,
    ) -> torch.Tensor:
        """Run the layer, or the part of it that the bound pass needs.

        Args:
            hidden_states: [batch, tokens, dim]; not read where a prompt's keys are written.
            encoder_hidden_states: embedded text [batch, text tokens, dim]; 0 tokens where it is cached.
            temb: modulation [batch, 6, dim]; not read where a prompt's keys are written.
            rotary_emb: tables of `FrameOffsetRotaryEmbedding`; not read where a prompt's keys are written.

        Returns:
            [batch, tokens, dim]; `hidden_states` unchanged for a keys-only pass.
        """
        text_pass = getattr(self.attn2.processor, "bound", None)
        if text_pass is not None and text_pass.writes_text:
            self.attn2(hidden_states, encoder_hidden_states)
            return hidden_states
        packed = getattr(self.attn1.processor, "packed", None)
        if packed is not None:
            packed.unpack()
        kernels = getattr(self.attn1.processor, "norms", None)
        norms = None if kernels is None else kernels.choose(self, hidden_states, temb)
        own_pass = getattr(self.attn1.processor, "bound", None)
        if own_pass is not None and own_pass.keys_only:
            self._write_keys(hidden_states, temb, rotary_emb, norms)
            made = hidden_states
        else:
            ordinary = self._run if self._compiled_call_impl is None else self._compiled_call_impl
            made = ordinary(hidden_states, encoder_hidden_states, temb, rotary_emb, norms)
        if packed is not None:
            packed.pack()
        return made

    def _run(
        self,
        hidden_states: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        temb: torch.Tensor,
        rotary_emb: RotaryTable,
        norms: LayerNorms | None,
    ) -> torch.Tensor:
        """The ordinary pass, the only one that is compiled."""
        if norms is not None:
            return run_layer(self, norms, hidden_states, encoder_hidden_states, temb, rotary_emb)
        made: torch.Tensor = super().forward(hidden_states, encoder_hidden_states, temb, rotary_emb)
        return made

    def _write_keys(
        self, hidden_states: torch.Tensor, temb: torch.Tensor, rotary_emb: RotaryTable, norms: LayerNorms | None
    ) -> None:
        """Self-attention up to its keys; everything after them is skipped."""
        modulation = self.scale_shift_table + temb.float()
        if norms is not None:
            self.attn1(norm_for_self_attention(self, norms, hidden_states, modulation), None, None, rotary_emb)
            return
        # As diffusers' forward begins.
        shift, scale = modulation[:, :2].chunk(2, dim=1)
        normed = (self.norm1(hidden_states.float()) * (1 + scale) + shift).type_as(hidden_states)
        self.attn1(normed, None, None, rotary_emb)
