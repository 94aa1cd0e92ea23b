"""Passes through the transformer as CUDA graphs, where launches take longer than kernels: small models, small pictures.

Only passes that come again and again with the same kernels: without an attention bias or a text per frame. A packed
past, or hooks on layers, which do what no graph repeats (streamed layers among them), end it for the stream. Keys,
values, weights and the prompt's keys are read where they are, and their addresses compared.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from diffusers import WanTransformer3DModel

from .attention_passes import CausalPass
from .head_scaled_kv_cache import HeadScaledKVCache
from .packed_kv_cache import PackedKVCache

if TYPE_CHECKING:
    from .attention import CausalAttention


def run_pass(
    transformer: WanTransformer3DModel,
    causal: CausalAttention,
    causal_pass: CausalPass,
    sample: torch.Tensor,
    time: torch.Tensor,
) -> torch.Tensor:
    """The transformer's output for a pass that is bound; by a graph where `causal.graphs` has one.

    Args:
        transformer: of the stream.
        causal: its link.
        causal_pass: that is bound.
        sample: latents [batch, channels, latent frames, height, width] in the transformer's dtype.
        time: float32 [batch].

    Returns:
        The shape of `sample`.
    """
    graphs = causal.graphs
    if graphs is not None and not graphs.off and not _may_repeat(transformer, causal, causal_pass):
        # Their memory may be what was short when layers began to be streamed, or the past to be packed.
        graphs.stop(
            "layers are streamed or have hooks, the past is packed, or weights or attention are of another kind"
        )
    if graphs is None or graphs.off or not _comes_again(causal_pass):
        made: torch.Tensor = transformer(sample, time, _no_text(transformer, sample), return_dict=False)[0]
        return made
    rope = causal.rope
    table = rope(sample)

    def compute(sample: torch.Tensor, time: torch.Tensor, *table: torch.Tensor) -> torch.Tensor:
        with rope.given_table((table[0], table[1])):
            text = _no_text(transformer, sample)
            computed: torch.Tensor = type(transformer).forward(transformer, sample, time, text, return_dict=False)[0]
            return computed

    def forward(*_: Any, **__: Any) -> tuple[torch.Tensor]:  # noqa: ANN401
        key = _kind_of(transformer, causal, causal_pass, sample)
        in_place = list(_read_in_place(transformer, causal_pass))
        return (graphs.call(key, in_place, (sample, time, *table), compute),)

    # Through the transformer's own call, so that its hooks fire.
    transformer.forward = forward
    try:
        made = transformer(sample, time)[0]
    finally:
        del transformer.forward
    return made


def _comes_again(causal_pass: CausalPass) -> bool:
    """Whether the next blocks have passes with the same kernels."""
    return causal_pass.key_bias is None and causal_pass.cross_cache.texts == 1


def _may_repeat(transformer: WanTransformer3DModel, causal: CausalAttention, causal_pass: CausalPass) -> bool:
    """Whether kernels are all that a pass does, and its tensors have addresses."""
    if isinstance(causal_pass.kv_cache, PackedKVCache) or causal.takes_block_masks or "forward" in vars(transformer):
        return False
    blocks = transformer.blocks
    # Tensors of a library's own type, quantized ones for example, have no address of their own.
    has_addresses = type(_first_weight(blocks[0])) in (torch.Tensor, torch.nn.Parameter)
    return has_addresses and not any(block._forward_pre_hooks or block._forward_hooks for block in blocks)


def _kind_of(
    transformer: WanTransformer3DModel, causal: CausalAttention, causal_pass: CausalPass, sample: torch.Tensor
) -> Hashable:
    own = causal_pass.kv_cache
    return (
        (sample.shape, sample.dtype, type(own), own.length, own.capacity),
        (causal_pass.causal_tokens, causal_pass.groups, causal_pass.keys_only, causal_pass.kept_tokens),
        causal_pass.next_window,
        causal_pass.cross_cache.few is None,
        (causal.backend, causal.library, transformer.blocks[0]._compiled_call_impl is None),
    )


def _read_in_place(transformer: WanTransformer3DModel, causal_pass: CausalPass) -> Iterator[torch.Tensor]:
    """Keys and values, and of each layer one weight, which tells whether it has moved."""
    own, text = causal_pass.kv_cache, causal_pass.cross_cache
    for buffers in (own.keys, own.values, text.keys, text.values):
        yield from buffers
    if isinstance(own, HeadScaledKVCache):
        for scales in own.scales:
            yield from scales
    yield from (part for part in text.few or () if isinstance(part, torch.Tensor))
    yield transformer.patch_embedding.weight
    yield transformer.proj_out.weight
    yield from map(_first_weight, transformer.blocks)


def _first_weight(block: Any) -> torch.Tensor:  # noqa: ANN401
    weight: torch.Tensor = block.ffn.net[-1].weight
    return weight


def _no_text(transformer: WanTransformer3DModel, sample: torch.Tensor) -> torch.Tensor:
    """Text of length 0: the prompt's keys are cached, so the text embedder has no work."""
    return sample.new_zeros((sample.shape[0], 0, transformer.config.text_dim))
