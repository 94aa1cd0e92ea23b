"""What the layers' compilation asks of torch."""

import torch
from torch._inductor import compile_fx

from streamblocks.wan.transformer.compiled_blocks import compile_transformer_blocks

from small_wan import make_components, make_pipeline, make_state, run_steps


def test_no_kernel_is_chosen_by_timing_it(monkeypatch):
    """Two compilations, one of them with streamed layers, would differ in how they sum, and so in their pictures."""
    seen = []

    def watch(graph, example_inputs, config_patches=None, **others):
        seen.append(config_patches)
        return graph.forward

    monkeypatch.setattr(compile_fx, "compile_fx", watch)
    pipe = make_pipeline(make_components())
    compile_transformer_blocks(pipe.transformer)
    run_steps(pipe, make_state(), last="denoise_block")
    torch._dynamo.reset()
    assert seen and all(patches == {"deterministic": True} for patches in seen)
