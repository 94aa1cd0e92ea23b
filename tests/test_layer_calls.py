"""Every layer's work goes through the layer's own call: what watches, streams or offloads layers sees each one."""

import copy
from collections import Counter
from itertools import pairwise
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
    write_keys,
)

from small_wan import BLOCKS, CHANGED_AT, LAYERS, TEXT_DIM, make_components, make_pipeline, stream

STEPS = 3
# Denoising steps, one pass for keys (none over the context of block 0), and the keys of a new prompt.
CALLS = {
    "recompute": [STEPS + (index > 0) + (index in (0, CHANGED_AT)) for index in range(BLOCKS)],
    "rolling": [STEPS + 1 + (index in (0, CHANGED_AT)) for index in range(BLOCKS)],
}


@pytest.fixture(scope="module")
def components():
    return make_components()


def watch_layers(transformer):
    """The calls of each layer, counted before and after each."""
    before: Counter[int] = Counter()
    behind: Counter[int] = Counter()
    for index, block in enumerate(transformer.blocks):

        def count_before(module, arguments, index=index):
            # A compiler cannot trace this: under fullgraph it would raise inside the compiled code.
            torch._dynamo.graph_break()
            before[index] += 1

        block.register_forward_pre_hook(count_before)
        block.register_forward_hook(lambda *_, index=index: behind.update([index]))
    return before, behind


@pytest.mark.parametrize("backend", [None, "eager"], ids=["plain", "compiled"])
@pytest.mark.parametrize("policy", CALLS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_hooks_see_every_call_of_every_layer(components, policy, backend):
    pipe = make_pipeline(components, backend=backend)
    expected, graphs = stream(pipe, kv_policy=policy)
    # Registered after the compilation, as by an offloader that is added later.
    before, behind = watch_layers(pipe.transformer)
    seen = []
    made, graphs_watched = stream(pipe, before_block=lambda index: seen.append(before[0]), kv_policy=policy)
    seen.append(before[0])
    assert [later - earlier for earlier, later in pairwise(seen)] == CALLS[policy]
    assert before == behind == dict.fromkeys(range(LAYERS), sum(CALLS[policy]))
    assert graphs_watched == [graphs[-1]] * BLOCKS and graphs[-1] == (0 if backend is None else 1)
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("policy", CALLS)
def test_a_layer_whose_weights_come_and_go_makes_the_same_stream(components, policy):
    """accelerate's offloading: outside of the layer's own call its weights are on the meta device."""
    expected, _ = stream(make_pipeline(components), kv_policy=policy)
    pipe = make_pipeline(components)
    for block in pipe.transformer.blocks:
        kept = {name: value.clone() for name, value in block.state_dict().items()}
        hook = AlignDevicesHook(execution_device="cpu", offload=True, weights_map=kept, place_submodules=True)
        add_hook_to_module(block, hook)
    assert {parameter.device.type for parameter in pipe.transformer.blocks.parameters()} == {"meta"}
    made, _ = stream(pipe, kv_policy=policy)
    for ours, theirs in zip(made, expected, strict=True):
        assert torch.equal(ours, theirs)


class CountOperations(TorchDispatchMode):
    """How often each aten operation ran, and the numbers that matrix products multiplied."""

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        self.calls[name] += 1
        made = func(*args, **(kwargs or {}))
        if name == "addmm":
            self.products += args[1].numel() * made.shape[-1]
        return made


def attentions(calls):
    return sum(count for name, count in calls.items() if name.startswith("_scaled_dot_product"))


def test_a_pass_for_keys_leaves_out_what_lies_behind_the_last_layers_keys(components):
    transformer = make_pipeline(components).transformer
    cross = allocate_cross_cache(transformer, text_tokens=16)
    fill_cross_cache(transformer, cross, torch.randn(1, 16, TEXT_DIM), "a cat")
    latents = torch.randn(1, 16, 3, 4, 6)
    counted: dict[Any, CountOperations] = {}
    linears: dict[Any, list[str]] = {}
    for make_pass in (predict_velocity, write_keys):
        cache = allocate_kv_cache(transformer, frames=6, latent_height=4, latent_width=6)
        called = linears[make_pass] = []
        hooks = [
            layer.register_forward_pre_hook(lambda *_, name=name, called=called: called.append(name))
            for name, layer in transformer.blocks[-1].named_modules()
            if isinstance(layer, nn.Linear)
        ]
        counted[make_pass] = CountOperations()
        with counted[make_pass]:
            make_pass(transformer, latents, 0.0, CausalPass(cache, cross, frame_offset=0))
        for hook in hooks:
            hook.remove()
    left_out = ["attn1.to_out.0", "attn2.to_q", "attn2.to_out.0", "ffn.net.0.proj", "ffn.net.2"]
    assert linears[predict_velocity] == ["attn1.to_qkv", *left_out]
    assert linears[write_keys] == ["attn1.to_qkv"]
    whole, alone = counted[predict_velocity], counted[write_keys]
    assert whole.calls["addmm"] - alone.calls["addmm"] == len(left_out)
    assert attentions(whole.calls) - attentions(alone.calls) == 2
    tokens, dim, ffn_dim = 18, 64, 128
    assert whole.products - alone.products == tokens * (3 * dim * dim + 2 * dim * ffn_dim)


def test_the_keys_of_a_prompt_need_its_projections_only(components):
    transformer = make_pipeline(components).transformer
    cross = allocate_cross_cache(transformer, text_tokens=16)
    with CountOperations() as counted:
        fill_cross_cache(transformer, cross, torch.randn(1, 16, TEXT_DIM), "a cat")
    # Two of the text embedder, and two per layer.
    assert counted.calls["addmm"] == 2 + 2 * LAYERS
    assert not attentions(counted.calls)


def test_a_pass_for_keys_gives_no_velocity(components):
    transformer = make_pipeline(components).transformer
    cross = allocate_cross_cache(transformer, text_tokens=16)
    cache = allocate_kv_cache(transformer, frames=6, latent_height=4, latent_width=6)
    causal_pass = CausalPass(cache, cross, frame_offset=0, keys_only=True)
    with pytest.raises(ValueError, match="keys_only is True, which gives no velocity"):
        predict_velocity(transformer, torch.randn(1, 16, 3, 4, 6), 0.0, causal_pass)


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_copy_of_a_compiled_layer_computes_with_its_own_weights(components):
    pipe = make_pipeline(components, backend="eager")
    expected, _ = stream(pipe, blocks=1)
    twin = copy.deepcopy(pipe.transformer)
    for parameter in pipe.transformer.blocks.parameters():
        parameter.fill_(float("nan"))
    pipe.update_components(transformer=twin)
    made, _ = stream(pipe, blocks=1)
    assert torch.equal(made[0], expected[0])
