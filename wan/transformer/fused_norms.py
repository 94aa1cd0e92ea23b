"""A layer whose norms are one kernel each: with the residual before them and the quantization of rows after them.

Which kernels a layer can use is decided outside of compiled code, at each call of the layer: a hook on a module that
would be skipped, a norm of another class or a projection that takes no quantized rows leave it to diffusers' forward,
or to norms that do not quantize.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast

import torch
from diffusers.models.activations import GELU
from diffusers.models.attention import FeedForward
from diffusers.models.normalization import FP32LayerNorm
from diffusers.models.transformers.transformer_wan import WanAttention, WanTransformerBlock
from torch import nn

from ...ops.fp8_linear import FP8Linear, QuantizedRows
from ...ops.kernels.layer_norm_launch import LAYER_NORM, LayerNormVariant, Residual, RowScaling
from ...ops.normed_rows import add_and_norm
from .rope import RotaryTable


class Quantizes(NamedTuple):
    """Which of a layer's three norms write rows in 8 bits: all that reads them takes such rows."""

    self_attention: bool
    cross_attention: bool
    feed_forward: bool


class LayerNorms(NamedTuple):
    """How one layer's norms are computed; two layers with equal ones share a compiled graph.

    Attributes:
        kernel: of `LAYER_NORM`; None computes the same with torch.
        quantizes: see `Quantizes`.
    """

    kernel: Any
    quantizes: Quantizes


@dataclass
class LayerNormKernels:
    """What the layers of one pass ask for their norms; each kind of layer is looked up once."""

    device: torch.device
    dtype: torch.dtype
    _loaded: dict[tuple[int, Quantizes], Any] = field(default_factory=dict)

    @classmethod
    def of_pass(cls, device: torch.device, dtype: torch.dtype) -> LayerNormKernels | None:
        """None where the kernel is not used."""
        return cls(device, dtype) if LAYER_NORM.why_not(device, dtype) is None else None

    def choose(self, block: WanTransformerBlock, hidden: torch.Tensor, temb: torch.Tensor) -> LayerNorms | None:
        """How to compute this layer's norms; None for diffusers' forward. Call it outside of compiled code.

        Args:
            block: with processors that take `QuantizedRows`.
            hidden: its input.
            temb: its modulation; one for each token has 4 dimensions, and is left to diffusers.
        """
        if temb.ndim != 3 or hidden.dtype != self.dtype or not has_plain_layer_norms(block):
            return None
        quantizes = what_takes_rows(block)
        kind = hidden.shape[-1], quantizes
        if kind not in self._loaded:
            self._loaded[kind] = self._load(*kind)
        kernel = self._loaded[kind]
        return None if kernel is None else LayerNorms(kernel, quantizes)

    def _load(self, columns: int, quantizes: Quantizes) -> Any:  # noqa: ANN401
        variants = (
            LayerNormVariant(columns, False, False, True, quantizes.self_attention),
            LayerNormVariant(columns, True, True, False, quantizes.cross_attention),
            LayerNormVariant(columns, True, False, True, quantizes.feed_forward),
        )
        kernels = [LAYER_NORM.load(self.device, self.dtype, variant) for variant in variants]
        return None if None in kernels else kernels[0]


def has_plain_layer_norms(block: WanTransformerBlock) -> bool:
    """Whether the norms are diffusers' own, with weights only where the kernel expects them, and nothing hooks them."""
    norms = (block.norm1, block.norm2, block.norm3)
    if any(type(norm) is not FP32LayerNorm or _is_watched(norm) for norm in norms):
        return False
    weights = [norm.weight is not None and norm.bias is not None for norm in norms]
    bare = [norm.weight is None and norm.bias is None for norm in norms]
    return weights[1] and bare[0] and bare[2]


def what_takes_rows(block: WanTransformerBlock) -> Quantizes:
    """Which norms of `block` may quantize."""
    return Quantizes(
        _attention_takes_rows(block.attn1, ("to_q", "to_k", "to_v")),
        _attention_takes_rows(block.attn2, ("to_q",)),
        _feed_forward_takes_rows(block.ffn),
    )


def run_layer(
    block: WanTransformerBlock,
    norms: LayerNorms,
    hidden: torch.Tensor,
    text: torch.Tensor,
    temb: torch.Tensor,
    rotary_emb: RotaryTable,
) -> torch.Tensor:
    """The layer, in six matrix products, two attentions and the passes over memory between them.

    Args:
        block: the layer.
        norms: of `LayerNormKernels.choose`.
        hidden: [batch, tokens, dim].
        text: embedded text, or none of its tokens where its keys are cached.
        temb: [batch, 6, dim]: shift, scale and gate of self-attention, then of the feed-forward layer.
        rotary_emb: tables of the tokens.
    """
    modulation = block.scale_shift_table + temb.float()
    normed = norm_for_self_attention(block, norms, hidden, modulation)
    added = block.attn1(normed, None, None, rotary_emb)
    norm = block.norm2
    hidden, normed = add_and_norm(
        hidden,
        RowScaling(norm.weight.unsqueeze(0), norm.bias.unsqueeze(0), False, norm.eps),
        Residual(added, modulation[:, 2]),
        quantize=norms.quantizes.cross_attention,
        kernel=norms.kernel,
    )
    added = block.attn2(normed, text, None, None)
    hidden, normed = add_and_norm(
        hidden,
        RowScaling(modulation[:, 4], modulation[:, 3], True, block.norm3.eps),
        Residual(added, None),
        quantize=norms.quantizes.feed_forward,
        kernel=norms.kernel,
    )
    made: torch.Tensor = hidden.float() + block.ffn(normed) * modulation[:, 5:]
    return made.to(hidden.dtype)


def norm_for_self_attention(
    block: WanTransformerBlock, norms: LayerNorms, hidden: torch.Tensor, modulation: torch.Tensor
) -> torch.Tensor | QuantizedRows:
    """The first norm of a layer; `modulation` is float32 [batch, 6, dim]."""
    scaling = RowScaling(modulation[:, 1], modulation[:, 0], True, block.norm1.eps)
    return add_and_norm(hidden, scaling, None, quantize=norms.quantizes.self_attention, kernel=norms.kernel)[1]


def _attention_takes_rows(attn: WanAttention, parts: tuple[str, ...]) -> bool:
    if len(parts) > 1 and getattr(attn, "fused_projections", False):
        parts = ("to_qkv",)
    return not _is_watched(attn) and all(_takes_rows(getattr(attn, part)) for part in parts)


def _feed_forward_takes_rows(ffn: nn.Module) -> bool:
    if type(ffn) is not FeedForward or _is_watched(ffn):
        return False
    activation = cast(nn.ModuleList, ffn.net)[0]
    return type(activation) is GELU and not _is_watched(activation) and _takes_rows(cast(nn.Module, activation.proj))


def _takes_rows(layer: nn.Module) -> bool:
    return isinstance(layer, FP8Linear) and layer.takes_rows() and not _is_watched(layer)


def _is_watched(module: nn.Module) -> bool:
    """Whether hooks, or another forward put on the instance, would see what this way hides from them."""
    return bool(module._forward_hooks or module._forward_pre_hooks) or "forward" in vars(module)
