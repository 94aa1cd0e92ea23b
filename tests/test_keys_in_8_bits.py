"""A KV cache in 8 bits with a scale per head: what 8-bit attention reads without quantizing it again."""

import pytest
import torch
from emulated_flash3 import emulated_flash3, flash_attn_func

from streamblocks.ops import flash3 as flash3_module
from streamblocks.ops.attention_backends import FLASH3_FP8
from streamblocks.ops.head_quantization import (
    quantize_heads,
    round_heads,
    scale_with_margin,
    unround_heads,
)
from streamblocks.wan.steps import prepare_steps
from streamblocks.wan.transformer.eight_bits import Packing
from streamblocks.wan.transformer.head_scaled_kv_cache import HeadScaledKVCache
from streamblocks.wan.transformer.installed_attention import causal_attention_of
from streamblocks.wan.transformer.kv_cache import KVCache
from streamblocks.wan.transformer.packed_kv_cache import PackedKVCache

from small_wan import make_components, make_pipeline, make_state, run_steps, stream

CPU = torch.device("cpu")


def draw_keys():
    return torch.randn(1, 500, 3, 64, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.fixture(scope="module")
def components():
    return make_components()


@pytest.fixture
def scaled_pipeline(components):
    pipe = make_pipeline(components)
    causal_attention_of(pipe.transformer).use_backend(FLASH3_FP8)
    with emulated_flash3():
        yield pipe


def test_fixed_scales_round_like_those_of_a_call():
    """Over a factor of 100 of the scale; what would not fit is clamped."""
    key = draw_keys()
    rounded, scale = quantize_heads(key)
    exact = key.float()

    def error(made, of):
        return float((unround_heads(made, of, torch.float32) - exact).norm() / exact.norm())

    found = error(rounded, scale)
    wide = scale_with_margin(key)
    assert torch.equal(wide, scale * 16)
    assert error(round_heads(key, wide), wide) < 1.02 * found
    assert error(round_heads(key, scale * 90), scale * 90) < 1.05 * found
    assert float(round_heads(key, scale / 2).float().abs().max()) == 448.0


@pytest.mark.parametrize("settings", [{}, {"context_frames": 6}, {"fuse_context": True}, {"kv_policy": "rolling"},
                                      {"kv_policy": "rolling", "context_frames": 4, "fuse_context": True}])  # fmt: skip
def test_keys_in_8_bits_give_what_keys_quantized_in_each_call_give(components, scaled_pipeline, settings, monkeypatch):
    """Of a stream long enough for windows that move; both are as far from the exact stream."""
    # Under `recompute` later blocks would need pictures.
    blocks = 3 if "kv_policy" in settings else 1 + settings.get("context_frames", 3) // 3
    exact = stream(make_pipeline(components), blocks=blocks, last="remember_block", **settings)[0]
    made = stream(scaled_pipeline, blocks=blocks, last="remember_block", **settings)[0]
    monkeypatch.setattr(prepare_steps, "reads_8_bits", lambda transformer: False)
    by_call = stream(scaled_pipeline, blocks=blocks, last="remember_block", **settings)[0]

    def error(latents):
        whole = torch.cat(exact, dim=2)
        return float((torch.cat(latents, dim=2) - whole).norm() / whole.norm())

    assert 0 < error(made) < 1.3 * error(by_call) < 0.1


def test_nothing_is_quantized_twice(scaled_pipeline, monkeypatch):
    """Attention is called with what the cache holds."""
    spied = []

    def spy(q, k, v, **scales):
        spied.append((k.data_ptr(), v.data_ptr(), scales["k_descale"].data_ptr()))
        return flash_attn_func(q, k, v, **scales)

    state = make_state()
    run_steps(scaled_pipeline, state, last="remember_block")
    cache = state.get("kv_cache")
    assert isinstance(cache, HeadScaledKVCache) and cache.keys[0].dtype == torch.float8_e4m3fn
    monkeypatch.setattr(flash3_module, "flash3_function", lambda: spy)
    run_steps(scaled_pipeline, state, last="remember_block")
    held = {
        (keys.data_ptr(), values.data_ptr(), scales.key.data_ptr())
        for keys, values, scales in zip(cache.keys, cache.values, cache.scales, strict=True)
    }
    assert set(spied) == held


def test_a_bias_and_packing_find_the_keys_in_8_bits(scaled_pipeline):
    """A bias from the start keeps exact keys; one that comes later reads those of 8 bits, as INT8 does."""
    state = make_state(attention_bias=0.5)
    run_steps(scaled_pipeline, state, last="remember_block")
    assert type(state.get("kv_cache")) is KVCache
    made = {}
    for name in ("same", "bias", "packed"):
        state = make_state(kv_policy="rolling", context_frames=3)
        run_steps(scaled_pipeline, state, last="remember_block")
        if name == "bias":
            state.values["attention_bias"] = 0.999
        if name == "packed":
            cache = state.get("kv_cache")
            assert cache.length and cache.layer_bytes < 36 * 2 * 2 * 32 * 2
            state.values["kv_cache"] = PackedKVCache.take_over(cache, Packing(6, torch.int8))
        state.values["block_idx"] = 1
        run_steps(scaled_pipeline, state, last="denoise_block")
        made[name] = state.get("latents")
    for name in ("bias", "packed"):
        assert 0 < (made[name] - made["same"]).norm() < 0.1 * made["same"].norm(), name


def test_keys_in_8_bits_are_a_snapshot(scaled_pipeline):
    state = make_state(kv_policy="rolling", context_frames=3)
    for index in range(2):
        state.values["block_idx"] = index
        run_steps(scaled_pipeline, state, last="remember_block")
    cache = state.get("kv_cache")
    again = HeadScaledKVCache.from_snapshot(cache.to_snapshot(), CPU)
    cache.begin_block(18)
    assert again.length == cache.length == 18 and again.wide_dtype == "float32"
    for one, other in zip((*cache.keys, *cache.values), (*again.keys, *again.values), strict=True):
        assert torch.equal(one[:, :18].view(torch.uint8), other[:, :18].view(torch.uint8))
    for layer, copied in zip(cache.scales, again.scales, strict=True):
        assert all(torch.equal(one, other) and one is not other for one, other in zip(layer, copied, strict=True))
    parts = cache.to_snapshot()
    whole, short = parts["scales"], [[scale[:, :1] for scale in layer] for layer in parts["scales"]]
    # On CUDA a kernel would read past the end of what a file says here.
    for changed, says in (
        ({"scales": short}, "other layers, heads or bits"),
        ({"scales": whole[:1]}, "other layers, heads or bits"),
        ({"scales": [*whole[:1], *short[1:]]}, "no float32 of each head"),
        ({"scales": [[scale.double() for scale in layer] for layer in whole]}, "no float32 of each head"),
        ({"wide_dtype": "load"}, "no model has"),
    ):
        with pytest.raises(ValueError, match=says):
            HeadScaledKVCache.from_snapshot({**parts, **changed}, CPU)


@pytest.mark.parametrize("change", ["too long", "negative", "another head"])
def test_a_cache_that_a_pass_would_overrun_is_refused(components, change):
    """Before a kernel writes to it."""
    pipe, state = make_pipeline(components), make_state(kv_policy="rolling", context_frames=3)
    run_steps(pipe, state, last="remember_block")
    cache = state.get("kv_cache")
    if change == "another head":
        cache.values[1] = cache.values[1][:, :, :1]
    else:
        cache.length = cache.capacity - 1 if change == "too long" else -1
    state.values["block_idx"] = 1
    cache.begin_block = lambda tokens: None
    with pytest.raises(ValueError, match=r"kv_cache holds .*: start a new stream\."):
        run_steps(pipe, state, last="denoise_block")
