"""The causal pieces against diffusers' own transformer."""

import pytest
import torch
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from diffusers.utils.torch_utils import randn_tensor

from streamblocks.wan.steps.prepare_steps import draw_noise
from streamblocks.wan.transformer import attention as attention_module
from streamblocks.wan.transformer import cross_attention as cross_attention_module
from streamblocks.wan.transformer import rope as rope_module
from streamblocks.wan.transformer.attention_passes import CausalPass, make_key_bias
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
    write_keys,
)
from streamblocks.wan.transformer.installed_attention import causal_attention_of, install_causal_attention
from streamblocks.wan.transformer.joined_projections import fuse_self_attention
from streamblocks.wan.transformer.kv_cache import KVCache, write_block
from streamblocks.wan.transformer.rope import apply_rotary

from golden_wan import build_golden_transformer, load_golden, relative_error

HEIGHT, WIDTH, TOKENS = 4, 6, 6


class MaskedProcessor(WanAttnProcessor):
    """diffusers' processor with the mask that diffusers' own block never passes."""

    def __init__(self, mask):
        super().__init__()
        self.mask = mask

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        return super().__call__(attn, hidden_states, encoder_hidden_states, self.mask, rotary_emb)


@pytest.fixture
def golden():
    return load_golden()


@pytest.fixture
def latents():
    return torch.randn((1, 16, 9, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(5))


def cross_cache_for(transformer, golden):
    cache = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cache, golden["text"], "golden")
    return cache


def run_by_blocks(transformer, golden, latents, cache, *, timestep=400.0, frames_per_block=3, bias=1.0):
    cross = cross_cache_for(transformer, golden)
    parts = []
    for start in range(0, latents.shape[2], frames_per_block):
        block = latents[:, :, start : start + frames_per_block]
        tokens = block.shape[2] * TOKENS
        cache.begin_block(tokens)
        key_bias = make_key_bias(
            bias, past_tokens=cache.length, capacity=cache.capacity, tokens_per_frame=TOKENS, like=cache.keys[0]
        )
        parts.append(predict_velocity(transformer, block, timestep, CausalPass(cache, cross, start, key_bias=key_bias)))
        cache.commit(tokens)
    return torch.cat(parts, dim=2)


def block_causal_mask(frames, frames_per_block, extra=None):
    block = torch.arange(frames * TOKENS) // (frames_per_block * TOKENS)
    allowed = block[:, None] >= block[None, :]
    mask = torch.zeros(allowed.shape).masked_fill_(~allowed, float("-inf"))
    return mask if extra is None else mask + extra


@torch.no_grad()
def masked_pass(golden, latents, mask, timestep=400.0):
    reference = build_golden_transformer(golden, causal=False)
    for block in reference.blocks:
        block.attn1.set_processor(MaskedProcessor(mask))
    return reference(latents, torch.tensor([timestep]), golden["text"], return_dict=False)[0]


@pytest.mark.parametrize("fused", [False, True])
@torch.no_grad()
def test_uncached_block_equals_diffusers(golden, latents, fused):
    block, time = latents[:, :, :3], torch.tensor([937.0])
    expected = build_golden_transformer(golden, causal=False)(block, time, golden["text"], return_dict=False)[0]
    transformer = build_golden_transformer(golden)
    if fused:
        fuse_self_attention(transformer)
    assert relative_error(transformer(block, time, golden["text"], return_dict=False)[0], expected) <= 1e-5
    cache = allocate_kv_cache(transformer, frames=3, latent_height=HEIGHT, latent_width=WIDTH)
    causal_pass = CausalPass(cache, cross_cache_for(transformer, golden), frame_offset=0)
    assert relative_error(predict_velocity(transformer, block, 937.0, causal_pass), expected) <= 1e-5


@pytest.mark.parametrize("frames_per_block", [1, 3])
def test_rolling_cache_equals_one_pass_under_a_block_causal_mask(golden, latents, frames_per_block):
    transformer = build_golden_transformer(golden)
    cache = allocate_kv_cache(transformer, frames=9, latent_height=HEIGHT, latent_width=WIDTH)
    actual = run_by_blocks(transformer, golden, latents, cache, frames_per_block=frames_per_block)
    expected = masked_pass(golden, latents, block_causal_mask(9, frames_per_block))
    assert relative_error(actual, expected) <= 1e-4
    # The mask matters: without it the result is another one.
    assert relative_error(actual, masked_pass(golden, latents, torch.zeros(54, 54))) > 1e-3


def test_context_pass_over_several_blocks_equals_the_block_causal_mask(golden, latents):
    transformer = build_golden_transformer(golden)
    cache = allocate_kv_cache(transformer, frames=9, latent_height=HEIGHT, latent_width=WIDTH)
    causal_pass = CausalPass(cache, cross_cache_for(transformer, golden), frame_offset=0, causal_tokens=3 * TOKENS)
    actual = predict_velocity(transformer, latents, 400.0, causal_pass)
    assert relative_error(actual, masked_pass(golden, latents, block_causal_mask(9, 3))) <= 1e-4


def test_attention_bias_equals_an_additive_mask_on_past_frames_but_the_first(golden, latents):
    transformer = build_golden_transformer(golden)
    cache = allocate_kv_cache(transformer, frames=9, latent_height=HEIGHT, latent_width=WIDTH)
    actual = run_by_blocks(transformer, golden, latents, cache, bias=0.3)
    frame = torch.arange(9 * TOKENS) // TOKENS
    block = frame // 3
    biased = (frame[None, :] >= 1) & (block[None, :] < block[:, None])
    log_bias = torch.zeros(biased.shape).masked_fill_(biased, torch.tensor(0.3).log())
    expected = masked_pass(golden, latents, block_causal_mask(9, 3, log_bias))
    assert relative_error(actual, expected) <= 1e-4
    unbiased = masked_pass(golden, latents, block_causal_mask(9, 3))
    assert relative_error(actual, unbiased) > 1e-4


def diffusers_layout(table):
    """Our two tables as diffusers' cos and sin, each value twice in a row."""
    (cos, sin), (minus_sin, cos_again) = (half.unbind(-1) for half in table)
    assert torch.equal(cos, cos_again) and torch.equal(sin, -minus_sin)
    return cos.repeat_interleave(2, dim=-1), sin.repeat_interleave(2, dim=-1)


def test_rope_equals_diffusers_beyond_its_offset(golden, latents):
    reference = build_golden_transformer(golden, causal=False).rope
    rope = causal_attention_of(build_golden_transformer(golden)).rope
    for ours, theirs in zip(diffusers_layout(rope(latents)), reference(latents), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-6)
    rope.frame_offset = 6
    for ours, theirs in zip(diffusers_layout(rope(latents[:, :, :3])), reference(latents), strict=True):
        torch.testing.assert_close(ours, theirs[:, 6 * TOKENS :], rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rotation_is_the_product_of_complex_numbers_in_float32(golden, latents, dtype):
    table = causal_attention_of(build_golden_transformer(golden)).rope(latents)
    hidden = torch.randn((1, 9 * TOKENS, 2, 32), generator=torch.Generator().manual_seed(3)).to(dtype)
    pairs = torch.view_as_complex(hidden.float().unflatten(-1, (-1, 2)))
    expected = torch.view_as_real(pairs * torch.view_as_complex(table[0])).flatten(-2)
    actual = apply_rotary(hidden, *table)
    assert actual.dtype is torch.float32
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


def test_rope_has_no_last_frame(golden, latents):
    rope = causal_attention_of(build_golden_transformer(golden)).rope
    rope.frame_offset = 1_000_000
    assert torch.isfinite(rope(latents)[0]).all()


def test_rotary_tables_are_made_once_per_place_and_two_are_kept(golden, latents, monkeypatch):
    made = []

    def spy(place, axis_dims):
        made.append(place[0])
        return make(place, axis_dims)

    make = rope_module._make_table
    monkeypatch.setattr(rope_module, "_make_table", spy)
    transformer = build_golden_transformer(golden)
    cross = cross_cache_for(transformer, golden)
    cache = allocate_kv_cache(transformer, frames=6, latent_height=HEIGHT, latent_width=WIDTH)
    for offset in (0, 3, 0, 3, 6, 6, 3, 0):
        predict_velocity(transformer, latents[:, :, :3], 400.0, CausalPass(cache, cross, offset))
    assert made == [0, 3, 6, 0]
    assert [place[0] for place in cache.rotary.kept] == [3, 0]
    predict_velocity(transformer, latents[:, :, :6], 400.0, CausalPass(cache, cross, 3))
    assert made == [0, 3, 6, 0, 3]  # another number of frames is another place
    assert causal_attention_of(transformer).rope.tables is None


def test_attention_reads_the_cache_in_place(golden, latents, monkeypatch):
    seen = []

    def spy(query, key, value, **kwargs):
        seen.append((key, value))
        return dispatch(query, key, value, **kwargs)

    dispatch = attention_module.dispatch_attention_fn
    for module in (attention_module, cross_attention_module):
        monkeypatch.setattr(module, "dispatch_attention_fn", spy)
    transformer = build_golden_transformer(golden)
    cross = cross_cache_for(transformer, golden)
    cache = allocate_kv_cache(transformer, frames=9, latent_height=HEIGHT, latent_width=WIDTH)
    cache.commit(3 * TOKENS)
    predict_velocity(transformer, latents[:, :, :6], 0.0, CausalPass(cache, cross, 3, causal_tokens=3 * TOKENS))
    own = [pair for pair in zip(cache.keys, cache.values, strict=True) for _ in range(2)]
    text = list(zip(cross.keys, cross.values, strict=True))
    expected = [*own[:2], text[0], *own[2:], text[1]]
    for (key, value), (keys, values) in zip(seen, expected, strict=True):
        assert key.data_ptr() == keys.data_ptr() and value.data_ptr() == values.data_ptr()
        # SDPA's own layout is a permutation; heads and their values lie as a fused kernel reads them.
        assert key.stride() == keys.stride() and key.stride(-1) == 1


def test_a_pass_for_keys_writes_those_of_a_whole_pass(golden, latents):
    transformer = build_golden_transformer(golden)
    cross, layers = cross_cache_for(transformer, golden), list(transformer.blocks)
    caches = []
    for make_pass in (predict_velocity, write_keys):
        cache = allocate_kv_cache(transformer, frames=9, latent_height=HEIGHT, latent_width=WIDTH)
        make_pass(transformer, latents[:, :, :6], 0.0, CausalPass(cache, cross, 3, causal_tokens=3 * TOKENS))
        caches.append(cache)
    for whole, alone in ((part(caches[0]), part(caches[1])) for part in (lambda c: c.keys, lambda c: c.values)):
        assert all(torch.equal(a, b) and a.any() for a, b in zip(whole, alone, strict=True))
    assert list(transformer.blocks) == layers


@pytest.mark.parametrize("shape", [(1, 16, 3, 4, 6), (1, 3, 5), (3,)])
def test_noise_drawn_ahead_equals_noise_drawn_one_after_another(shape):
    ours, theirs = torch.Generator().manual_seed(7), torch.Generator().manual_seed(7)
    first = draw_noise(shape, count=1, generator=ours, device=torch.device("cpu"))
    others = draw_noise(shape, count=3, generator=ours, device=torch.device("cpu"))
    assert draw_noise(shape, count=0, generator=ours, device=torch.device("cpu")).shape == (0, *shape)
    for noise in (*first, *others):
        assert torch.equal(noise, randn_tensor(shape, generator=theirs, dtype=torch.float32))


def test_kv_cache_keeps_the_sink_and_the_newest_frames():
    cache = KVCache.allocate(
        layers=1,
        heads=1,
        head_dim=1,
        frames=6,
        tokens_per_frame=1,
        sink_frames=1,
        device=torch.device("cpu"),
        dtype=torch.float32,
    )
    for start in range(0, 12, 3):
        cache.begin_block(3)
        frames = torch.arange(start, start + 3, dtype=torch.float32).view(1, 3, 1, 1)
        write_block(cache.keys[0], cache.values[0], cache.length, frames, frames)
        cache.commit(3)
    assert cache.keys[0].flatten().tolist() == cache.values[0].flatten().tolist() == [0, 7, 8, 9, 10, 11]


def test_kv_cache_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="sink_frames is 6"):
        KVCache.allocate(
            layers=1,
            heads=1,
            head_dim=1,
            frames=6,
            tokens_per_frame=1,
            sink_frames=6,
            device=torch.device("cpu"),
            dtype=torch.float32,
        )


def test_attention_without_installation_is_named(golden):
    with pytest.raises(ValueError, match="install_causal_attention"):
        causal_attention_of(build_golden_transformer(golden, causal=False))
    install_causal_attention(build_golden_transformer(golden, causal=False), "native")
