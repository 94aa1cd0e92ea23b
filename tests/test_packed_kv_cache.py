"""The KV cache in 8 bits: near the golden values, what it holds, and that nothing else changes."""

from dataclasses import replace

import pytest
import torch
from test_estimate import estimate

from streamblocks.families.kv_policies import KV_AUTO, KV_FP8, KV_PLAIN
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
    write_keys,
)
from streamblocks.wan.transformer.eight_bits import PackedTokens, Packing
from streamblocks.wan.transformer.kv_cache import KVCache
from streamblocks.wan.transformer.packed_kv_cache import PackedKVCache

from golden_wan import build_golden_transformer, load_golden, relative_error

pytestmark = pytest.mark.usefixtures("no_pipeline")


@pytest.mark.parametrize(
    ("dtype", "of_value", "of_largest"),
    # 3 bits of mantissa: half a step is at most 1/16 of a value, and of the largest one 2^-10 / 448 near zero.
    [(torch.float8_e4m3fn, 1 / 16, 2**-10 / 448), (torch.int8, 0.0, 0.5001 / 127)],
)
def test_a_token_is_within_the_rounding_of_its_own_scale(dtype, of_value, of_largest):
    torch.manual_seed(0)
    values = torch.randn(1, 12, 3, 16) * torch.logspace(-3, 3, 12).view(1, 12, 1, 1)
    packed = PackedTokens.allocate(12, 3, 16, torch.device("cpu"), dtype)
    packed.pack_from(values, 2, 9)
    again = torch.zeros_like(values)
    packed.unpack_to(again, 12)
    assert not again[:, :2].any() and not again[:, 9:].any()
    largest = values.abs().amax(-1, keepdim=True)[:, 2:9]
    assert ((again - values)[:, 2:9].abs() <= values[:, 2:9].abs() * of_value + largest * of_largest).all()
    # A token of zeros stays zeros.
    packed.pack_from(torch.zeros_like(values), 0, 12)
    packed.unpack_to(again, 12)
    assert not again.any()


def test_moving_tokens_takes_their_scales_along():
    values = torch.arange(1.0, 9.0).view(1, 8, 1, 1).expand(1, 8, 1, 4).contiguous()
    packed = PackedTokens.allocate(8, 1, 4, torch.device("cpu"), torch.float8_e4m3fn)
    packed.pack_from(values, 0, 8)
    packed.move(3, 8, 1)
    moved = torch.zeros_like(values)
    packed.unpack_to(moved, 6)
    assert torch.allclose(moved[0, :6, 0, 0], torch.tensor([1.0, 4, 5, 6, 7, 8]), rtol=1e-6)


def passes(transformer, golden, packing):
    """A context of one block, then a step of the next, as `recompute` makes them; the step's velocity and the cache."""
    cache = allocate_kv_cache(transformer, frames=6, latent_height=4, latent_width=6, packing=packing)
    cross = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cross, golden["text"], "golden")
    torch.manual_seed(1)
    context, block = torch.randn(2, 1, 16, 3, 4, 6)
    write_keys(transformer, context, 0.0, CausalPass(cache, cross, frame_offset=0))
    cache.commit(3 * cache.tokens_per_frame)
    causal_pass = CausalPass(cache, cross, frame_offset=3)
    first = predict_velocity(transformer, block, 1000.0, causal_pass)
    assert torch.equal(predict_velocity(transformer, block, 1000.0, causal_pass), first)
    return first, cache


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float8_e4m3fn, 0.02), (torch.int8, 0.004)])
def test_a_step_after_a_packed_context_is_near_the_exact_one(dtype, bound):
    golden = load_golden()
    transformer = build_golden_transformer(golden)
    exact, plain = passes(transformer, golden, None)
    packed, cache = passes(transformer, golden, Packing(3, dtype))
    assert type(plain) is KVCache and isinstance(cache, PackedKVCache)
    # e4m3fn's own rounding is 2 to 3 % of a value, and that of INT8 0.6 % of a spread of noise; attention averages over
    # tokens, and most of a layer does not attend.
    assert 0 < relative_error(packed, exact) < bound
    # The context's tokens in 8 bits with a scale per head, where every frame had 32 bits.
    heads, head_dim = cache.keys[0].shape[2:]
    assert cache.layer_bytes == 2 * 3 * cache.tokens_per_frame * heads * (head_dim + 4)
    assert plain.layer_bytes == 2 * 6 * plain.tokens_per_frame * heads * head_dim * 4
    assert len({keys.data_ptr() for keys in cache.keys}) == 1


RECOMPUTE = StreamSettings(width=96, height=96, steps=2, kv_format=KV_FP8)
ROLLING = replace(RECOMPUTE, kv_policy="rolling", context_frames=6, sink_frames=1)


@pytest.mark.parametrize(
    "settings",
    [RECOMPUTE, replace(ROLLING, fuse_context=True)],
    ids=["recompute", "rolling in fewer passes"],
)
def test_the_estimate_is_within_ten_percent_of_what_a_stream_takes(tiny_folder, settings):
    expected = estimate(tiny_folder, settings, torch.bfloat16)
    pipeline = materialise(Recipe(str(tiny_folder), dtype="bfloat16"))
    with PeakMeter() as meter, Session(pipeline, settings) as session:
        for _ in range(4):
            session.run_block("waves")
    assert expected.transformer + expected.vae + expected.streaming == pytest.approx(meter.peak_bytes, rel=0.10)


@pytest.mark.parametrize("settings", [RECOMPUTE, ROLLING], ids=["recompute", "rolling"])
def test_a_stream_looks_the_same_but_for_rounding(tiny_folder, settings):
    """Its first block attends to nothing that was packed; later ones are near, also once the window slides."""
    pictures = {}
    for kv_format in (KV_PLAIN, KV_FP8):
        with Session(materialise(Recipe(str(tiny_folder))), replace(settings, kv_format=kv_format)) as session:
            pictures[kv_format] = [session.run_block("waves").frames.float() for _ in range(5)]
    plain, packed = pictures.values()
    assert torch.equal(plain[0], packed[0])
    for before, after in zip(plain[1:], packed[1:], strict=True):
        assert not torch.equal(before, after)
        assert (before - after).abs().mean() < 3


def test_a_format_that_is_none_is_named():
    with pytest.raises(ValueError, match="kv_format is 'int4': choose one of auto, model's dtype, FP8"):
        StreamSettings(kv_format="int4")
    assert StreamSettings(kv_format=KV_AUTO).kv_format == "auto"
