"""Attention by optional packages: who may use it, what falls back, what 8 bits cost, and torch.compile."""

import logging
import re

import pytest
import torch
from emulated_flash3 import emulated_flash3, flash_attn_func
from torch._dynamo.utils import counters
from torch.nn import functional as F

from streamblocks.ops import flash3 as flash3_module
from streamblocks.ops import library_attention
from streamblocks.ops.attention_backends import (
    COMFY_INT8,
    EIGHT_BIT,
    FLASH3,
    FLASH3_FP8,
    FLASH3_FP8_SMOOTH,
    LIBRARY_BACKENDS,
)
from streamblocks.ops.flash3 import flash3
from streamblocks.ops.head_quantization import quantize_heads, smooth_keys
from streamblocks.stream.device_choice import check_attention_backend
from streamblocks.wan.transformer.installed_attention import causal_attention_of

from golden_wan import relative_error
from small_wan import make_components, make_pipeline, make_state, run_steps, stream

CPU, CARD = torch.device("cpu"), torch.device("cuda:0")
# Of torch's own float32 attention. e4m3fn rounds to 3 bits of mantissa, by up to 6.25 % and by 2.6 % in the mean.
BOUNDS = {FLASH3: 0.004, FLASH3_FP8: 0.06, FLASH3_FP8_SMOOTH: 0.06}


def tokens(queries=50, keys=500, heads=3, head_dim=64, offset=0.0):
    drawn = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, count, heads, head_dim, generator=drawn) for count in (queries, keys, keys))
    key += offset * torch.randn(1, 1, heads, head_dim, generator=drawn)
    return query.bfloat16(), key.bfloat16(), value.bfloat16()


def error_of(made, query, key, value):
    exact = F.scaled_dot_product_attention(*(part.float().transpose(1, 2) for part in (query, key, value)))
    return float((made.float() - exact.transpose(1, 2)).norm() / exact.norm())


@pytest.fixture
def hopper(monkeypatch):
    """A machine with a card of a given compute capability, and FlashAttention 3 installed or not."""
    machine = {"capability": (9, 0), "flash3": "fa3_fwd_interface", "comfy": None}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: machine["capability"])
    monkeypatch.setattr(library_attention, "find_flash3", lambda: machine["flash3"])
    monkeypatch.setattr(library_attention.importlib.util, "find_spec", lambda name: machine["comfy"])
    library_attention.ATTENTION_TRIALS.reset()
    yield machine
    library_attention.ATTENTION_TRIALS.reset()


@pytest.fixture
def emulated():
    with emulated_flash3():
        yield


@pytest.fixture
def emulated_calls(emulated, monkeypatch):
    """(queries, keys, dtype) of each call of FlashAttention 3, the trial aside."""
    calls = []

    def spy(q, k, v, **options):
        calls.append((q.shape[1], k.shape[1], q.dtype))
        return flash_attn_func(q, k, v, **options)

    assert library_attention.load(FLASH3_FP8, CPU, torch.float32, 32) == FLASH3_FP8
    monkeypatch.setattr(flash3_module, "flash3_function", lambda: spy)
    return calls


@pytest.mark.parametrize("name", LIBRARY_BACKENDS)
def test_without_cuda_each_is_refused_in_a_sentence(name):
    with pytest.raises(ValueError, match=f"attention_backend is {name!r}: .*runs on CUDA, not on cpu; choose 'native'"):
        check_attention_backend(name, CPU)


@pytest.mark.parametrize(
    ("name", "machine", "dtype", "head_dim", "reason"),
    [
        (FLASH3_FP8, {"capability": (8, 9)}, torch.bfloat16, 128, "needs a Hopper card .*9.0.* cuda:0 has 8.9"),
        (FLASH3, {"capability": (10, 0)}, torch.bfloat16, 128, "needs a Hopper card .* has 10.0"),
        (FLASH3, {"flash3": None}, torch.bfloat16, 128, "needs the package fa3-fwd .*not installed"),
        (FLASH3_FP8, {}, torch.float16, 128, "computes in bfloat16, and the transformer in float16"),
        (FLASH3_FP8, {}, torch.bfloat16, 72, "heads of 16, 32 .* up to 256 values, and they have 72"),
        (COMFY_INT8, {"capability": (7, 0)}, torch.float16, 128, "needs compute capability 7.5, .* has 7.0"),
        (COMFY_INT8, {}, torch.bfloat16, 128, "needs the package comfy-kitchen, which is not installed"),
    ],
)
def test_what_is_missing_is_said(hopper, name, machine, dtype, head_dim, reason):
    hopper.update(machine)
    assert library_attention.load(name, CARD, dtype, head_dim) is None
    told = library_attention.explain(name, CARD, dtype, head_dim)
    assert re.search(reason, told), told


def test_nothing_is_missing_on_hopper(hopper):
    hopper["comfy"] = object()
    assert [library_attention.why_not(name, CARD, torch.bfloat16, 128) for name in (FLASH3_FP8, COMFY_INT8)] == [
        None
    ] * 2


@pytest.mark.usefixtures("emulated")
def test_eight_bits_take_the_first_that_runs(monkeypatch):
    assert library_attention.load(EIGHT_BIT, CPU, torch.bfloat16, 64) == FLASH3_FP8
    library_attention.ATTENTION_TRIALS.reset()
    missing = {FLASH3_FP8: "it is missing", COMFY_INT8: "it is, too"}
    monkeypatch.setattr(library_attention, "why_not", lambda name, *_: missing[name])
    assert library_attention.load(EIGHT_BIT, CPU, torch.bfloat16, 64) is None
    told = library_attention.explain(EIGHT_BIT, CPU, torch.bfloat16, 64)
    assert told == "of flash3_fp8, it is missing; of comfy_int8, it is, too"


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize(
    ("broken", "reason"),
    [(lambda q, k, v, **_: torch.zeros_like(q).bfloat16(), "off by 100 %"), (None, "TypeError")],
    ids=["wrong values", "an error"],
)
def test_a_failed_trial_is_tried_once_and_said_once(monkeypatch, caplog, broken, reason):
    calls = []

    def function(*parts, **options):
        calls.append(parts)
        return broken(*parts, **options)

    monkeypatch.setattr(flash3_module, "flash3_function", lambda: function)
    failed = library_attention.ATTENTION_TRIALS.failed
    monkeypatch.setattr(library_attention, "why_not", lambda name, *_: failed.get(name))
    with caplog.at_level(logging.WARNING):
        assert [library_attention.load(FLASH3_FP8, CPU, torch.bfloat16, 64) for _ in range(2)] == [None, None]
    assert len(calls) == 1 and reason in failed[FLASH3_FP8]
    assert [FLASH3_FP8 in record.getMessage() for record in caplog.records] == [True]


@pytest.mark.usefixtures("emulated")
@pytest.mark.parametrize("name", BOUNDS)
def test_the_emulation_is_attention_within_the_rounding(name):
    """Of more keys than a tile has, and no whole number of tiles."""
    query, key, value = tokens()
    error = error_of(library_attention.attend(name, query, key, value), query, key, value)
    assert BOUNDS[name] / 4 < error < BOUNDS[name]


@pytest.mark.usefixtures("emulated")
def test_scales_are_those_of_each_head():
    """Of one head, everything is 2^10 times larger; with a scale for all heads the others would round to nothing."""
    query, key, value = tokens()
    larger = torch.tensor([1.0, 2.0**10, 1.0]).bfloat16().view(1, 1, 3, 1)
    plain = library_attention.attend(FLASH3_FP8, query, key, value)
    made = library_attention.attend(FLASH3_FP8, query * larger, key / larger, value * larger)
    assert torch.equal(made, plain * larger)


@pytest.mark.usefixtures("emulated")
def test_smoothing_takes_what_keys_have_in_common():
    query, key, value = tokens(offset=8.0)
    plain, smooth = (
        error_of(library_attention.attend(name, query, key, value), query, key, value)
        for name in (FLASH3_FP8, FLASH3_FP8_SMOOTH)
    )
    assert smooth < 0.06 < plain / 2
    assert torch.equal(smooth_keys(key[:, :16]), key[:, :16].float() - key[:, :1].float())


def test_quantized_heads_reach_the_largest_number():
    _, key, _ = tokens()
    rounded, scale = quantize_heads(key)
    assert rounded.is_contiguous() and scale.shape == (1, 3)
    assert rounded.float().abs().amax(dim=(0, 1, 3)).tolist() == [448.0] * 3
    assert float((rounded.float() * scale[:, None, :, None] - key.float()).norm() / key.float().norm()) < 0.03
    assert torch.isfinite(quantize_heads(torch.zeros_like(key))[0].float()).all()


def test_the_operator_has_shapes_without_data():
    query, key, value = (part.to("meta") for part in tokens())
    assert flash3(query, key, value, None, None, None).dtype == torch.bfloat16
    made = flash3(*(part.to(torch.float8_e4m3fn) for part in (query, key, value)), *[torch.ones(1, 3)] * 3)
    assert made.is_meta and made.shape == query.shape and made.dtype == torch.bfloat16


@pytest.fixture(scope="module")
def components():
    return make_components()


@pytest.mark.usefixtures("emulated", "fresh_dynamo")
def test_compiled_layers_have_no_graph_break(components):
    """The graphs are compiled with `fullgraph`."""
    made = []
    for backend in (None, "eager"):
        pipe = make_pipeline(components, backend=backend)
        causal_attention_of(pipe.transformer).use_backend(FLASH3_FP8)
        made += stream(pipe, blocks=1, last="remember_block")[0]
    assert counters["stats"]["unique_graphs"] == 1 and not counters["graph_break"]
    eager, compiled = made
    assert torch.allclose(eager, compiled, atol=1e-2)


@pytest.mark.usefixtures("emulated", "fresh_dynamo")
def test_inductor_compiles_a_pass_of_two_blocks_with_keys_in_8_bits(components):
    """The second block's keys are in a buffer of their own; 8-bit floats are more than inductor's copies can do."""
    made = []
    for backend in (None, "inductor"):
        pipe = make_pipeline(components, backend=backend)
        causal_attention_of(pipe.transformer).use_backend(FLASH3_FP8)
        made.append(stream(pipe, blocks=3, last="remember_block", kv_policy="rolling", fuse_context=True)[0])
    assert not counters["graph_break"]
    for eager, compiled in zip(*made, strict=True):
        assert relative_error(compiled, eager) < 0.02


def test_each_block_of_a_context_sees_those_before_it(components, emulated_calls):
    """A context of two blocks is computed with a call for each: no mask."""
    pipe = make_pipeline(components)
    causal_attention_of(pipe.transformer).use_backend(FLASH3_FP8)
    stream(pipe, blocks=3, last="prepare_context", context_frames=6)
    # Three steps of four layers; of the passes for keys the last layer attends to nothing.
    alone, with_one, with_two = ((18, keys, torch.float8_e4m3fn) for keys in (18, 36, 54))
    first, second = [alone] * 12, [alone] * 3 + [with_one] * 12
    assert emulated_calls == [*first, *second, *[alone, with_one] * 3, *[with_two] * 12]


def test_self_attention_alone_uses_it_and_a_bias_falls_back(components, emulated_calls, caplog):
    pipe = make_pipeline(components)
    causal_attention_of(pipe.transformer).use_backend(FLASH3_FP8)
    state = make_state(kv_policy="rolling", context_frames=3)
    for index in range(2):
        state.values["block_idx"] = index
        run_steps(pipe, state, last="remember_block")
    # 2 x 3 patches a frame, 3 frames a block: alone, then behind a context of three.
    assert {call[:2] for call in emulated_calls} == {(18, 18), (18, 36)}
    assert {call[2] for call in emulated_calls} == {torch.float8_e4m3fn}
    # Cross-attention is not among them.
    passes = len(emulated_calls)
    emulated_calls.clear()
    with caplog.at_level(logging.WARNING):
        state.values |= {"block_idx": 2, "attention_bias": 0.5}
        run_steps(pipe, state, last="denoise_block")
    assert passes == 2 * (12 + 3) and emulated_calls == []
    assert [record.getMessage() for record in caplog.records] == [
        "attention_backend flash3_fp8 falls back to native: it takes no attention bias, so passes with a bias are "
        "computed so."
    ]
