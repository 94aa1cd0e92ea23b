"""The pass at t = 0 over a denoised block, which writes the keys that later blocks attend to."""

from __future__ import annotations

import torch
from diffusers import WanTransformer3DModel

from ..transformer.attention_passes import CausalPass
from ..transformer.causal_transformer import fill_cross_cache, write_keys
from ..transformer.cross_attention_cache import CrossAttentionCache
from ..transformer.kv_cache import DeferredBlock, KVCache


def write_clean_keys(
    transformer: WanTransformer3DModel, block: DeferredBlock, kv_cache: KVCache, cross_cache: CrossAttentionCache
) -> None:
    """Write the block's keys after the past frames, and count it among them.

    Args:
        transformer: of the stream.
        block: just made, or deferred.
        kv_cache: as it was when the block was denoised.
        cross_cache: of the block's prompt, or else filled with it.
    """
    if cross_cache.prompt != block.prompt:
        fill_cross_cache(transformer, cross_cache, block.prompt_embeds, block.prompt)
    write_keys(transformer, block.latents, 0.0, CausalPass(kv_cache, cross_cache, block.frame_offset))
    kv_cache.commit(block.latents.shape[2] * kv_cache.tokens_per_frame)


def take_prompt(
    transformer: WanTransformer3DModel,
    kv_cache: KVCache,
    cross_cache: CrossAttentionCache,
    prompt_embeds: torch.Tensor,
    prompt: str,
) -> None:
    """Fill the prompt's keys if it is another one; before that, write those of a block that was made with the old one.

    Args:
        transformer: of the stream.
        kv_cache: may have deferred a block.
        cross_cache: of any prompt.
        prompt_embeds: [1, text tokens, text_dim].
        prompt: of the next block.
    """
    deferred = kv_cache.deferred
    if deferred is not None and deferred.prompt != prompt:
        write_clean_keys(transformer, deferred, kv_cache, cross_cache)
    if cross_cache.prompt != prompt:
        fill_cross_cache(transformer, cross_cache, prompt_embeds, prompt)
