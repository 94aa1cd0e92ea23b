"""The context's pass and a block's first step in one: the same numbers, in fewer passes over the weights."""

from dataclasses import replace

import pytest
import torch

from streamblocks.families.kv_policies import KV_FP8
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.transformer.attention_passes import CausalPass, make_key_bias
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
    predict_with_context,
    write_keys,
)
from streamblocks.wan.transformer.eight_bits import Packing
from streamblocks.wan.transformer.installed_attention import install_causal_attention

from golden_wan import build_golden_transformer, load_golden, relative_error
from small_wan import make_components

pytestmark = pytest.mark.usefixtures("no_pipeline")


@pytest.fixture(scope="module")
def golden():
    return load_golden()


def first_step(transformer, text, context, block, timestep, *, fused, bias=1.0, packed=None):
    """The velocity of a block's first step after a context of as many frames, and of the second step."""
    frames = block.shape[2]
    cache = allocate_kv_cache(
        transformer,
        frames=2 * frames,
        latent_height=block.shape[3],
        latent_width=block.shape[4],
        packing=packed,
    )
    cross = allocate_cross_cache(transformer, text_tokens=text.shape[1])
    fill_cross_cache(transformer, cross, text, "text")
    tokens = frames * cache.tokens_per_frame
    key_bias = make_key_bias(
        bias,
        past_tokens=tokens,
        capacity=cache.capacity,
        tokens_per_frame=cache.tokens_per_frame,
        like=cache.keys[0],
    )
    causal_pass = CausalPass(cache, cross, frame_offset=frames, key_bias=key_bias)
    if fused:
        first = predict_with_context(transformer, context, block, timestep, causal_pass)
    else:
        write_keys(transformer, context, 0.0, CausalPass(cache, cross, frame_offset=0))
    cache.commit(tokens)
    if not fused:
        first = predict_velocity(transformer, block, timestep, causal_pass)
    return first, predict_velocity(transformer, 0.5 * block, 500.0, causal_pass)


@pytest.mark.parametrize("bias", [1.0, 0.3])
@pytest.mark.parametrize("frames", [1, 3, 8])
def test_one_pass_gives_what_two_give(golden, frames, bias):
    """Also the second step, which reads the context's keys that the first has left in the cache."""
    transformer = build_golden_transformer(golden)
    torch.manual_seed(0)
    context, block = torch.randn(2, 1, 16, frames, 4, 6)
    made = [
        first_step(transformer, golden["text"], context, block, 1000.0, fused=fused, bias=bias)
        for fused in (False, True)
    ]
    for apart, together in zip(*made, strict=True):
        assert relative_error(together, apart) <= 1e-5


@pytest.mark.parametrize("bias", [1.0, 0.3])
@pytest.mark.parametrize("backend", ["native", "flex", "_native_math"])
def test_with_other_attention_and_the_past_in_8_bits(backend, bias):
    """Flex attention takes the block-causal mask, or the bias; the packed past is that of the same rounded keys."""
    torch.manual_seed(0)
    transformer = make_components()[0]
    install_causal_attention(transformer, backend)
    text, context, block = torch.randn(1, 16, 48), torch.randn(1, 16, 2, 4, 4), torch.randn(1, 16, 2, 4, 4)
    given = (transformer, text, context, block, 900.0)
    plain = [first_step(*given, fused=fused, bias=bias) for fused in (False, True)]
    assert relative_error(plain[1][0], plain[0][0]) <= 1e-5 and relative_error(plain[1][1], plain[0][1]) <= 1e-5
    packed = first_step(*given, fused=True, bias=bias, packed=Packing(2, torch.int8))
    # The fused step attends to exact keys; the next one to those in 8 bits.
    assert torch.equal(packed[0], plain[1][0])
    apart = first_step(*given, fused=False, bias=bias, packed=Packing(2, torch.int8))
    assert relative_error(packed[1], apart[1]) <= 1e-3


SETTINGS = StreamSettings(width=32, height=32, steps=2, seed=1)


def stream(pipeline, settings, blocks=4):
    calls = 0

    def count(module, arguments):
        nonlocal calls
        calls += 1

    passes: list[int] = []
    with Session(pipeline, settings, on_pass=passes.append) as session:
        pictures = [session.run_block("waves").frames]
        hook = pipeline.pipe.transformer.blocks[0].register_forward_pre_hook(count)
        pictures += [session.run_block("waves").frames for _ in range(blocks - 1)]
        hook.remove()
    return torch.cat(pictures).float(), calls / (blocks - 1), passes


@pytest.mark.parametrize(
    "spec", [None, QuantizationSpec("fp8"), QuantizationSpec("int8")], ids=["float32", "fp8", "int8"]
)
def test_a_stream_calls_each_layer_once_less_a_block(tiny_folder, spec):
    pipeline = materialise(Recipe(str(tiny_folder), quantization=spec))
    apart, calls, passes = stream(pipeline, SETTINGS)
    together, fewer, told = stream(pipeline, replace(SETTINGS, fuse_context=True))
    assert (calls, fewer) == (3, 2)
    assert len(told) == len(passes) - 3
    # Sums in another order; where activations are quantized, some are rounded to the other side.
    difference = (apart - together).abs()
    assert difference.max() <= (1 if spec is None else 4) and difference.mean() < 0.2


@pytest.mark.parametrize(
    ("changes", "expected"),
    # With 4 context frames the second block still has 3, as many as a block.
    [({"context_frames": 4}, 8 / 3), ({"context_frames": 2}, 3)],
    ids=["a longer context", "a shorter one"],
)
def test_where_it_cannot_be_the_passes_stay_apart(tiny_folder, changes, expected):
    settings = replace(SETTINGS, **changes)
    pipeline = materialise(Recipe(str(tiny_folder)))
    apart, calls, _ = stream(pipeline, settings)
    same, as_many, _ = stream(pipeline, replace(settings, fuse_context=True))
    assert (calls, as_many) == (3, expected)
    assert (apart - same).abs().max() <= 1


def test_with_the_past_in_8_bits_it_streams_too(tiny_folder):
    pipeline = materialise(Recipe(str(tiny_folder)))
    packed = replace(SETTINGS, kv_format=KV_FP8)
    apart, together = stream(pipeline, packed)[0], stream(pipeline, replace(packed, fuse_context=True))[0]
    assert (apart - together).abs().mean() < 3
