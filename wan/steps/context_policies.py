"""How a stream remembers its past: what happens to the KV cache before and after each block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from ...families.kv_policies import KV_FP8, KV_INT8, RECOMPUTE, ROLLING, check_kv_policy
from ..transformer.attention import CausalAttention
from ..transformer.attention_passes import CausalPass
from ..transformer.causal_transformer import write_keys
from ..transformer.cross_attention_cache import CrossAttentionCache
from ..transformer.eight_bits import Packing
from ..transformer.installed_attention import causal_attention_of
from ..transformer.kv_cache import DeferredBlock, KVCache
from ..vae.streaming_vae import LatentStatistics, encode_pixel_frame
from .clean_keys import write_clean_keys


def frame_cache_length(vae: AutoencoderKLWan, context_frames: int) -> int:
    """Pixel frames that `context_frames` latent frames stand for, 1 + (context - 1) * 4 for Wan's VAEs."""
    return 1 + (context_frames - 1) * int(vae.config.scale_factor_temporal)


@dataclass(frozen=True)
class Past:
    """The past of the stream, as the next block finds it.

    Attributes:
        position: latent frames of the stream before the block, including those it was started with.
        block_frames: latent frames of the block.
        context_frames: latent frames of the past that the block attends to, at most.
        kv_cache: of the stream; the policy brings it to the start of the block.
        cross_cache: the prompt's keys and values.
        latents: the newest latent frames, [1, channels, frames, height, width]; None where there are none.
        pictures: the newest pixel frames, oldest first, each [1, 3, height, width] in -1..1.
        statistics: of the VAE's latents.
        fuses_context: whether the first step may take the context's pass, or that of a deferred block, along.
        sink: the stream's first latent frames, as far as they stay in the window; None where there are none.
        keys_are_stale: whether the keys of the past belong to a prompt that has gone, and are to be computed anew.
        has_steps: whether the block is denoised at all; one that is its input has no first step.
    """

    position: int
    block_frames: int
    context_frames: int
    kv_cache: KVCache
    cross_cache: CrossAttentionCache
    latents: torch.Tensor | None
    pictures: Sequence[torch.Tensor]
    statistics: LatentStatistics
    fuses_context: bool = False
    sink: torch.Tensor | None = None
    keys_are_stale: bool = False
    has_steps: bool = True


@dataclass(frozen=True)
class BlockStart:
    """What a block begins with.

    Attributes:
        frame_offset: RoPE position of its first latent frame.
        context: latents whose keys the block's first step computes along; None if the cache holds all keys.
    """

    frame_offset: int
    context: torch.Tensor | None = None


class ContextPolicy(Protocol):
    """What happens to the KV cache before and after each block."""

    def packed_frames(self, context_frames: int, block_frames: int) -> int:
        """Latent frames whose keys are kept from one pass to another."""

    def start_block(self, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, past: Past) -> BlockStart:
        """Bring `past.kv_cache` to the start of a block: it holds the past's keys, with room for the block after them.

        Or it ends before the context that the start names, whose keys come next.

        Raises:
            ValueError: the stream provides too little of its past, or the block is too long for the cache.
        """

    def finish_block(
        self,
        transformer: WanTransformer3DModel,
        block: DeferredBlock,
        kv_cache: KVCache,
        cross_cache: CrossAttentionCache,
        *,
        defers: bool,
    ) -> None:
        """Keep what the next block needs of this denoised block in the KV cache.

        Args:
            transformer: of the stream.
            block: the latents, their place in time and their prompt.
            kv_cache: as it was when the block was denoised.
            cross_cache: of the block's prompt.
            defers: whether keys may be left to the next block's first pass.
        """


class Recompute:
    """Krea Realtime's policy: drop all keys and recompute those of the context latents at t = 0.

    The context attends under a block-causal mask. Once the window slides, the first context latent is replaced by its
    last picture, encoded again, because a latent frame is meaningful only after its past. A latent that the stream was
    started with is kept until the held pictures reach back to it. Context blocks are assumed as long as the next one.
    """

    def packed_frames(self, context_frames: int, block_frames: int) -> int:
        """The context: a block's own keys are never kept."""
        return context_frames

    def start_block(self, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, past: Past) -> BlockStart:
        """See `ContextPolicy`."""
        cache = past.kv_cache
        cache.reset()
        frames = self._context_frames(past)
        if not frames:
            return BlockStart(0)
        context = self._context_latents(vae, past, frames, causal_attention_of(transformer))
        if past.fuses_context and frames == past.block_frames:
            return BlockStart(frames, context)
        block_tokens = past.block_frames * cache.tokens_per_frame
        causal_pass = CausalPass(
            cache,
            past.cross_cache,
            frame_offset=0,
            # None if the context is one block: a compiled layer then reuses the graph of the stream's first block.
            causal_tokens=block_tokens if frames > past.block_frames else None,
            of_past=True,
        )
        write_keys(transformer, context, 0.0, causal_pass)
        cache.commit(frames * cache.tokens_per_frame)
        return BlockStart(frames)

    def finish_block(
        self,
        transformer: WanTransformer3DModel,
        block: DeferredBlock,
        kv_cache: KVCache,
        cross_cache: CrossAttentionCache,
        *,
        defers: bool,
    ) -> None:
        """Do nothing: the next block recomputes its keys."""

    def _context_frames(self, past: Past) -> int:
        """Latent frames the block attends to: all that exist, up to `context_frames` and the room before the block."""
        capacity = past.kv_cache.capacity // past.kv_cache.tokens_per_frame
        room = capacity - past.block_frames
        if room < min(past.position, 1):
            raise ValueError(
                f"num_frames_per_block is {past.block_frames}: this stream's KV cache holds {capacity} latent frames "
                f"with the context; choose at most {capacity - min(past.position, 1)}, or start a new stream."
            )
        return min(past.position, past.context_frames, room)

    def _context_latents(
        self, vae: AutoencoderKLWan, past: Past, frames: int, attention: CausalAttention
    ) -> torch.Tensor:
        held = 0 if past.latents is None else past.latents.shape[2]
        if past.latents is None or held < frames:
            raise ValueError(
                f"current_denoised_latents holds {held} latent frames: a block at stream_position {past.position} with "
                f"{past.context_frames} context frames needs the last {frames}; give them, or start at position 0."
            )
        context = past.latents[:, :, -frames:]
        if past.position == frames:
            return context
        reach = frame_cache_length(vae, frames)
        if not past.pictures:
            raise ValueError(
                f"frame_cache_context holds no pictures: a block at stream_position {past.position} with {frames} "
                f"context frames needs the last {reach} pictures; give them with the latents."
            )
        if len(past.pictures) < reach:
            return context
        oldest = past.pictures[-reach].unsqueeze(2)
        first = encode_pixel_frame(vae, oldest, past.statistics, attention.graphs).to(context.device)
        return torch.cat([first, context[:, :, 1:]], dim=2)


class Rolling:
    """Self-Forcing's policy: a window of keys, in which each block's keys at t = 0 replace the oldest.

    The pass that writes them needs the window as the block had it. It is made when the block is finished, or deferred
    to the next block's first step, if that is as long and has the same prompt.

    Keys of the window that are missing or stale are computed from its latents at t = 0, block after block, as LongLive
    (arXiv 2509.22622, "KV re-cache") does it when the prompt changes. One pass per block: as much memory as the clean
    pass takes, and in a compiled layer its graph.
    """

    def packed_frames(self, context_frames: int, block_frames: int) -> int:
        """The window: a block's clean keys come before the oldest go."""
        return context_frames + block_frames

    def start_block(self, transformer: WanTransformer3DModel, vae: AutoencoderKLWan, past: Past) -> BlockStart:
        """See `ContextPolicy`."""
        cache = past.kv_cache
        if past.position and (past.keys_are_stale or not (cache.length or cache.deferred)):
            self._compute_keys(transformer, past)
        deferred = cache.deferred
        if deferred is not None:
            frames = deferred.latents.shape[2]
            follows = deferred.frame_offset + frames == past.position
            # Without a first step its keys would be lost.
            if past.fuses_context and past.has_steps and follows and frames == past.block_frames:
                return BlockStart(past.position, deferred.latents)
            write_clean_keys(transformer, deferred, cache, past.cross_cache)
        cache.begin_block(past.block_frames * cache.tokens_per_frame)
        return BlockStart(past.position)

    def finish_block(
        self,
        transformer: WanTransformer3DModel,
        block: DeferredBlock,
        kv_cache: KVCache,
        cross_cache: CrossAttentionCache,
        *,
        defers: bool,
    ) -> None:
        """Make the clean pass, or defer it: keys at t = 0 replace those of the last denoising step and stay."""
        if defers:
            kv_cache.deferred = block
        else:
            write_clean_keys(transformer, block, kv_cache, cross_cache)

    def _compute_keys(self, transformer: WanTransformer3DModel, past: Past) -> None:
        """Fill the cache from the latents of the window: the sink's frames, then the newest."""
        capacity = past.kv_cache.capacity // past.kv_cache.tokens_per_frame
        frames = min(past.position, past.context_frames, capacity - past.block_frames)
        sink = past.kv_cache.sink_tokens // past.kv_cache.tokens_per_frame if past.position > frames else 0
        newest = frames - sink
        held, held_sink = (0 if latents is None else latents.shape[2] for latents in (past.latents, past.sink))
        if held < newest or held_sink < sink:
            raise ValueError(
                f"kv_cache is empty: a block at stream_position {past.position} under {ROLLING!r} attends to the keys "
                f"of {frames} frames before it, and current_denoised_latents holds {held} (sink_latents {held_sink}); "
                f"give the stream's kv_cache, or those latents, or choose {RECOMPUTE!r}."
            )
        past.kv_cache.reset()
        if sink and past.sink is not None:
            self._append_keys(transformer, past, past.sink[:, :, :sink], frame_offset=0)
        if newest and past.latents is not None:
            latents = past.latents[:, :, -newest:]
            # Blocks end where the next one starts, so what is short of a whole block comes first.
            first = newest % past.block_frames
            self._append_keys(transformer, past, latents[:, :, :first], frame_offset=past.position - newest)
            self._append_keys(transformer, past, latents[:, :, first:], frame_offset=past.position - newest + first)

    def _append_keys(
        self, transformer: WanTransformer3DModel, past: Past, latents: torch.Tensor, frame_offset: int
    ) -> None:
        if not latents.shape[2]:
            return
        cache = past.kv_cache
        for block in latents.split(past.block_frames, dim=2):
            causal_pass = CausalPass(cache, past.cross_cache, frame_offset=frame_offset, of_past=True)
            write_keys(transformer, block, 0.0, causal_pass)
            cache.commit(block.shape[2] * cache.tokens_per_frame)
            frame_offset += block.shape[2]


_PACKED_DTYPES = {KV_FP8: torch.float8_e4m3fn, KV_INT8: torch.int8}
_POLICIES: dict[str, ContextPolicy] = {RECOMPUTE: Recompute(), ROLLING: Rolling()}


def find_packing(kv_policy: str, kv_format: str, context_frames: int, block_frames: int) -> Packing | None:
    """How much of the past is kept in 8 bits; None for nothing."""
    if kv_format not in _PACKED_DTYPES:
        return None
    frames = find_context_policy(kv_policy).packed_frames(context_frames, block_frames)
    return Packing(frames, _PACKED_DTYPES[kv_format])


def find_context_policy(name: str) -> ContextPolicy:
    """The policy that users know by `name`.

    Raises:
        ValueError: there is none of that name.
    """
    check_kv_policy(name)
    return _POLICIES[name]
