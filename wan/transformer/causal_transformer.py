"""Passes through the causal transformer: fill the prompt cache, predict the velocity of a block."""

from __future__ import annotations

from dataclasses import replace
from typing import TypedDict

import torch
from diffusers import WanTransformer3DModel

from ...ops.few_key_attention import merge_padding
from ...ops.fp8_linear import FP8_DTYPE
from .attention_passes import CausalPass
from .causal_block import settings_for_layers
from .cross_attention_cache import CrossAttentionCache
from .eight_bits import Packing
from .head_scaled_kv_cache import HeadScaledKVCache
from .installed_attention import causal_attention_of
from .kv_cache import KVCache
from .packed_kv_cache import PackedKVCache
from .pass_graphs import run_pass


class _CacheSizes(TypedDict):
    layers: int
    heads: int
    head_dim: int
    frames: int
    tokens_per_frame: int
    sink_frames: int
    device: torch.device
    dtype: torch.dtype


def weight_dtype(transformer: WanTransformer3DModel) -> torch.dtype:
    """The dtype the transformer computes in (some small parameters stay float32)."""
    return transformer.patch_embedding.weight.dtype


def weight_device(transformer: WanTransformer3DModel) -> torch.device:
    """The device the transformer's weights are on."""
    return transformer.patch_embedding.weight.device


def tokens_per_latent_frame(transformer: WanTransformer3DModel, latent_height: int, latent_width: int) -> int:
    """Patches of one latent frame."""
    _, patch_height, patch_width = transformer.config.patch_size
    return (latent_height // patch_height) * (latent_width // patch_width)


def allocate_kv_cache(
    transformer: WanTransformer3DModel,
    *,
    frames: int,
    latent_height: int,
    latent_width: int,
    sink_frames: int = 0,
    packing: Packing | None = None,
    eight_bits: bool = False,
) -> KVCache:
    """Allocate a self-attention cache for this transformer, on its device.

    Args:
        transformer: of any size.
        frames: latent frames that it holds, those of the current block among them.
        latent_height: of a latent frame.
        latent_width: of a latent frame.
        sink_frames: that stay for good.
        packing: of the past; None keeps all frames alike.
        eight_bits: whether these are in 8 bits with a scale per head, as `reads_8_bits` says, or in the transformer's
            dtype.
    """
    config = transformer.config
    sizes: _CacheSizes = {
        "layers": config.num_layers,
        "heads": config.num_attention_heads,
        "head_dim": config.attention_head_dim,
        "frames": frames,
        "tokens_per_frame": tokens_per_latent_frame(transformer, latent_height, latent_width),
        "sink_frames": sink_frames,
        "device": weight_device(transformer),
        "dtype": weight_dtype(transformer),
    }
    if packing is not None:
        return PackedKVCache.allocate_packed(**sizes, packing=packing)
    if eight_bits:
        narrow: _CacheSizes = {**sizes, "dtype": FP8_DTYPE}
        return HeadScaledKVCache.with_scales(KVCache.allocate(**narrow), sizes["dtype"])
    return KVCache.allocate(**sizes)


def reads_8_bits(transformer: WanTransformer3DModel) -> bool:
    """Whether its attention, where it has no bias, takes keys and values in 8 bits with a scale per head."""
    head_dim = transformer.config.attention_head_dim
    kind = weight_device(transformer), weight_dtype(transformer), head_dim
    return causal_attention_of(transformer).reads_8_bits(*kind)


def allocate_cross_cache(transformer: WanTransformer3DModel, *, text_tokens: int) -> CrossAttentionCache:
    """Allocate a cross-attention cache for prompts of `text_tokens` tokens, on the transformer's device."""
    config = transformer.config
    return CrossAttentionCache.allocate(
        layers=config.num_layers,
        heads=config.num_attention_heads,
        head_dim=config.attention_head_dim,
        text_tokens=text_tokens,
        device=weight_device(transformer),
        dtype=weight_dtype(transformer),
    )


@torch.no_grad()
def fill_cross_cache(
    transformer: WanTransformer3DModel, cache: CrossAttentionCache, prompt_embeds: torch.Tensor, prompt: str
) -> None:
    """Compute the prompt's keys and values of every layer into `cache`, in place.

    Args:
        transformer: prepared by `install_causal_attention`; each of its layers is called once.
        cache: allocated for `prompt_embeds.shape[1]` tokens.
        prompt_embeds: [1, text tokens, text_dim], the text encoder's output, zero after the prompt's end. Or one for
            each latent frame of a block, [frames, text tokens, text_dim]; where they are too long for the room of one,
            the last one counts for all.
        prompt: kept in the cache, to detect a change.
    """
    texts, all_tokens = prompt_embeds.shape[:2]
    words = _count_words(prompt_embeds)
    if texts > 1 and not cache.has_room_for(texts, words):
        texts, words = 1, _count_words(prompt_embeds[-1:])
    # Until it is filled: a pass that runs out of memory leaves keys of both.
    cache.prompt = None
    cache.texts = texts
    used = prompt_embeds[-texts:, : all_tokens // texts]
    embeds = used.to(weight_device(transformer), weight_dtype(transformer))
    text = transformer.condition_embedder.text_embedder(embeds)
    with causal_attention_of(transformer).bind_text(cache):
        # In such a call a layer reads only the text.
        nothing = text[:, :0]
        for block in transformer.blocks:
            block(nothing, text, nothing, (nothing, nothing))
    cache.prompt = prompt
    few = merge_padding(words, all_tokens, device=embeds.device)
    # Where they are, for CUDA graphs that read them.
    cache.few = few if few is None or cache.few is None else cache.few.take(few)


def _count_words(prompt_embeds: torch.Tensor) -> int:
    """Tokens of [texts, text tokens, text_dim] before the zero padding, of the longest text."""
    if prompt_embeds.is_meta:
        # A memory rehearsal: the longest prompt needs the most.
        return prompt_embeds.shape[1]
    places = prompt_embeds.any(dim=-1).any(dim=0).nonzero()
    return int(places[-1]) + 1 if len(places) else 0


def predict_velocity(
    transformer: WanTransformer3DModel, latents: torch.Tensor, timestep: float, causal_pass: CausalPass
) -> torch.Tensor:
    """One pass through the transformer, writing the tokens of `latents` into the bound KV cache.

    Args:
        transformer: prepared by `install_causal_attention`.
        latents: [1, channels, latent frames, height, width], any float dtype.
        timestep: 0 (clean) to 1000 (noise), for all frames of the pass.
        causal_pass: the caches and the place in time.

    Returns:
        Velocity, float32, the shape of `latents`.

    Raises:
        ValueError: the pass is keys-only, which gives no velocity.
    """
    if causal_pass.keys_only:
        raise ValueError("causal_pass.keys_only is True, which gives no velocity: call write_keys instead.")
    return _forward(transformer, latents, (timestep,), causal_pass).float()


def write_keys(
    transformer: WanTransformer3DModel, latents: torch.Tensor, timestep: float, causal_pass: CausalPass
) -> None:
    """The pass of `predict_velocity`, for the keys it writes: skips the rest of the last layer."""
    tokens = latents.shape[2] * causal_pass.kv_cache.tokens_per_frame
    _forward(transformer, latents, (timestep,), replace(causal_pass, keys_only=True, kept_tokens=tokens))


def predict_with_context(
    transformer: WanTransformer3DModel,
    context: torch.Tensor,
    latents: torch.Tensor,
    timestep: float,
    causal_pass: CausalPass,
) -> torch.Tensor:
    """`write_keys` of the context at t = 0 and `predict_velocity` of the block after it, in one pass over the weights.

    The context is all of the past (`recompute`), or the deferred block that comes after it (`rolling`).
    Layer by layer the block needs only that layer's keys of the context, so both go through each layer together: as a
    batch of two for everything that is done token by token, each with its own timestep, and as one sequence for
    attention, in which the context does not see the block. The same numbers, but for rounding.

    Args:
        transformer: prepared by `install_causal_attention`.
        context: [1, channels, latent frames, height, width], as many frames as `latents`.
        latents: of the block.
        timestep: of the block.
        causal_pass: of the block; its cache ends with the context's past. The context's keys are written there and are
            not committed. Its bias is on the keys that are left by then, as are those that the block sees.

    Returns:
        Velocity of the block, float32, the shape of `latents`.
    """
    frames = latents.shape[2]
    cache = causal_pass.kv_cache
    tokens = frames * cache.tokens_per_frame
    both = torch.cat([context.to(latents), latents])
    window = cache.next_window(tokens, tokens)
    # A context that is all of the past leaves room for the block behind it.
    sees_less = cache.deferred is not None and (window.dropped > 0 or window.packs is not None)
    joint = replace(
        causal_pass,
        frame_offset=causal_pass.frame_offset - frames,
        causal_tokens=tokens,
        next_window=window if sees_less else None,
        kept_tokens=tokens,
        groups=2,
    )
    return _forward(transformer, both, (0.0, timestep), joint)[1:].float()


@torch.no_grad()
def _forward(
    transformer: WanTransformer3DModel, latents: torch.Tensor, timesteps: tuple[float, ...], causal_pass: CausalPass
) -> torch.Tensor:
    dtype = weight_dtype(transformer)
    sample = latents.to(weight_device(transformer), dtype)
    # Filled one by one: a tensor made from a list would be a copy that the host waits for.
    time = torch.empty((len(timesteps),), device=sample.device, dtype=torch.float32)
    for place, timestep in zip(time, timesteps, strict=True):
        place.fill_(timestep)
    tokens = causal_pass.groups * latents.shape[2] * causal_pass.kv_cache.tokens_per_frame
    causal = causal_attention_of(transformer)
    with causal.bind(causal_pass, tokens), settings_for_layers(transformer):
        return run_pass(transformer, causal, causal_pass, sample, time)
