"""Compiled transformer blocks: how many graphs a stream needs, and that they compute the same. Counts, no timing."""

from contextvars import copy_context

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import compile_fx

from streamblocks.families.kv_policies import KV_FP8
from streamblocks.wan.transformer.compiled_blocks import compile_transformer_blocks

from golden_wan import relative_error
from small_wan import BLOCKS, CHANGED_AT, make_components, make_pipeline, make_state, run_steps, stream


@pytest.fixture(scope="module")
def components():
    return make_components()


# One graph for all lengths of the past, for any number of layers and blocks.
CASES = {
    "recompute": ({"kv_policy": "recompute"}, [1, 1, 1, 1, 1, 1]),
    "rolling": ({"kv_policy": "rolling"}, [1, 1, 1, 1, 1, 1]),
    "rolling with sink": ({"kv_policy": "rolling", "sink_frames": 1, "context_frames": 4}, [1, 1, 1, 1, 1, 1]),
    "a window that fills in five blocks": ({"kv_policy": "rolling", "context_frames": 12}, [1, 1, 1, 1, 1, 1]),
    # The context pass over two blocks has another number of tokens.
    "six context frames": ({"kv_policy": "recompute", "context_frames": 6}, [1, 1, 2, 2, 2, 2]),
    # Biased steps differ from the context pass, which has no bias.
    "biased recompute": ({"kv_policy": "recompute", "attention_bias": 0.3}, [1, 2, 2, 2, 2, 2]),
    # And from the clean pass.
    "biased rolling": ({"kv_policy": "rolling", "attention_bias": 0.3, "context_frames": 12}, [1, 2, 2, 2, 2, 2]),
}


@pytest.mark.parametrize(("settings", "expected"), CASES.values(), ids=CASES.keys())
@pytest.mark.usefixtures("fresh_dynamo")
def test_layers_and_lengths_of_the_past_share_graphs(components, settings, expected):
    """The backend's own part of the compiler sees what writes to caches, which `eager` would let pass."""
    plain, _ = stream(make_pipeline(components), **settings)
    assert not counters["stats"]["unique_graphs"]
    # Within dynamo's default limits: past them it would go back to eager, or fail under fullgraph.
    compiled, graphs = stream(make_pipeline(components, backend="aot_eager"), **settings)
    assert graphs == expected
    assert not counters["graph_break"]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_itself_needs_no_graph_for_an_empty_past(components):
    """Where torch writes the keys: in a copy to a part of a buffer it would ask whether the part begins at 0."""
    settings = {"kv_policy": "rolling", "context_frames": 9, "blocks": 4, "last": "remember_block"}
    plain, _ = stream(make_pipeline(components), **settings)
    compiled, graphs = stream(make_pipeline(components, backend="inductor"), **settings)
    assert graphs == [1, 1, 1, 1]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_pass_of_two_blocks_is_one_graph_and_another_once_the_window_slides(components):
    settings = {"kv_policy": "rolling", "attention_bias": 0.3, "fuse_context": True, "kv_format": KV_FP8}
    plain, _ = stream(make_pipeline(components), blocks=3, last="remember_block", **settings)
    pipe = make_pipeline(components, backend="aot_eager")
    compiled, graphs = stream(pipe, blocks=3, last="remember_block", **settings)
    assert graphs == [1, 3, 4] and not counters["graph_break"]
    for ours, theirs in zip(compiled, plain, strict=True):
        assert relative_error(ours, theirs) <= 1e-5


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_second_stream_compiles_nothing(components):
    pipe = make_pipeline(components, backend="eager", fused=False)
    first, graphs = stream(pipe, kv_policy="rolling")
    again, graphs_again = stream(pipe, kv_policy="rolling")
    assert graphs[-1] == 1 and graphs_again == [1] * BLOCKS
    for ours, theirs in zip(again, first, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.usefixtures("fresh_dynamo")
def test_limits_of_the_compiler_hold_in_a_context_of_its_own_for_each_prompt(components):
    """ComfyUI runs each prompt so, and torch from 2.13 on forgets there what was set in another."""
    before, limits = torch._dynamo.config.recompile_limit, []

    def backend(graph, inputs):
        limits.append(torch._dynamo.config.recompile_limit)
        return graph.forward

    pipe = copy_context().run(make_pipeline, components, backend=backend)
    for frames in (3, 4):
        copy_context().run(stream, pipe, blocks=1, last="denoise_block", num_frames_per_block=frames)
    assert limits == [64, 64] and torch._dynamo.config.recompile_limit == before


@pytest.mark.usefixtures("fresh_dynamo")
def test_no_kernel_is_chosen_by_timing_it(components, monkeypatch):
    """Two compilations, one of them with streamed layers, would differ in how they sum, and so in their pictures."""
    seen = []

    def watch(graph, example_inputs, config_patches=None, **others):
        seen.append(config_patches)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", watch)
    pipe = make_pipeline(components)
    compile_transformer_blocks(pipe.transformer)
    run_steps(pipe, make_state(), last="denoise_block")
    assert seen
    assert all(patches == {"deterministic": True, "max_autotune_gemm_backends": "ATEN"} for patches in seen)


@pytest.fixture
def asked_waits(monkeypatch):
    """The sync debug mode at each `Stream.synchronize`, which is let through; some versions of torch raise there."""
    modes = []
    synchronize = torch.cuda.Stream.synchronize

    def wait(stream):
        modes.append(torch.cuda.get_sync_debug_mode())
        torch.cuda.set_sync_debug_mode("default")
        try:
            synchronize(stream)
        finally:
            torch.cuda.set_sync_debug_mode(modes[-1])

    monkeypatch.setattr(torch.cuda.Stream, "synchronize", wait)
    return modes


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_no_operation_of_a_block_makes_the_host_wait(components, policy, asked_waits):
    """The decode step asks for one wait in each block, for the pictures; nothing else may wait.

    Where the prompt changes its words are counted, on the host.
    """
    pipe = make_pipeline(components, device="cuda")

    def watch(index):
        # Block 0 makes the caches and copies the VAE's latent statistics.
        torch.cuda.set_sync_debug_mode("default" if index in (0, CHANGED_AT) else "error")

    try:
        made, _ = stream(pipe, before_block=watch, kv_policy=policy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # 2 is "error": an unrequested wait would have raised.
    assert asked_waits == [0 if index in (0, CHANGED_AT) else 2 for index in range(BLOCKS)]
    assert all(torch.isfinite(latents).all() for latents in made)
