"""Install the causal attention in a transformer, and find it there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffusers import WanTransformer3DModel

from .attention import CausalAttention, CausalSelfAttnProcessor
from .causal_block import CausalWanBlock
from .cross_attention import CachedCrossAttnProcessor
from .rope import FrameOffsetRotaryEmbedding
from .rotary_store import has_plain_norms

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


def install_causal_attention(transformer: WanTransformer3DModel, backend: str = "native") -> CausalAttention:
    """Give every layer our class and cached processors, and the transformer an offsettable RoPE; no weight changes.

    Args:
        transformer: any size of Wan text-to-video.
        backend: name of a diffusers attention backend, such as "native" or "flash", or one of `LIBRARY_BACKENDS`.

    Returns:
        The link through which passes are bound; `causal_attention_of` finds it again.
    """
    config = transformer.config
    rope = FrameOffsetRotaryEmbedding(config.attention_head_dim, tuple(config.patch_size))
    plain_norms = all(has_plain_norms(block.attn1) for block in transformer.blocks)
    causal = CausalAttention(rope, backend, plain_norms=plain_norms)
    transformer.rope = rope
    for block in transformer.blocks:
        processors = (CausalSelfAttnProcessor(causal), CachedCrossAttnProcessor(causal))
        block.__class__ = CausalWanBlock
        block.attn1.set_processor(processors[0])
        block.attn2.set_processor(processors[1])
        causal.layers.append(processors)
    return causal


def causal_attention_of(transformer: WanTransformer3DModel) -> CausalAttention:
    """Find the link that `install_causal_attention` made.

    Raises:
        ValueError: the transformer has other processors.
    """
    processor = transformer.blocks[0].attn1.processor
    if not isinstance(processor, CausalSelfAttnProcessor):
        raise ValueError(
            f"the transformer's attention processor is {type(processor).__name__}: call "
            "install_causal_attention(transformer) first."
        )
    return processor.causal


def block_masks_of(transformer: object) -> dict[str, BlockMask]:
    """The block masks kept for a transformer, by shape; empty for None and for a transformer without our processors."""
    causal = _causal_attention_if_any(transformer)
    return {} if causal is None else causal.block_masks.masks()


def library_of(transformer: object) -> str | None:
    """Which of `LIBRARY_BACKENDS` a transformer's attention is to be computed by; None for none of them."""
    causal = _causal_attention_if_any(transformer)
    return None if causal is None else causal.library


def _causal_attention_if_any(transformer: object) -> CausalAttention | None:
    blocks = getattr(transformer, "blocks", None)
    processor = getattr(getattr(blocks[0] if blocks else None, "attn1", None), "processor", None)
    return processor.causal if isinstance(processor, CausalSelfAttnProcessor) else None
