"""A small random Wan, its pipeline, and a short stream of it whose prompt changes on the way."""

import copy

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.modular_pipelines import PipelineState
from torch._dynamo.utils import counters

from streamblocks.wan.steps.causal_wan_blocks import make_causal_wan_pipeline
from streamblocks.wan.transformer.installed_attention import install_causal_attention
from streamblocks.wan.transformer.joined_projections import fuse_self_attention

LAYERS, BLOCKS, TEXT_DIM = 4, 6, 48
CHANGED_AT = 3


def make_components():
    torch.manual_seed(0)
    transformer = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=32,
        text_dim=TEXT_DIM,
        freq_dim=32,
        ffn_dim=128,
        num_layers=LAYERS,
    )
    vae = AutoencoderKLWan(base_dim=8, z_dim=16, num_res_blocks=1)
    return transformer.eval().requires_grad_(False), vae.eval().requires_grad_(False)


def make_pipeline(components, *, backend=None, fused=True, device="cpu"):
    transformer, vae = (copy.deepcopy(component).to(device) for component in components)
    if fused:
        fuse_self_attention(transformer)
    install_causal_attention(transformer)
    if backend is not None:
        for block in transformer.blocks:
            block.compile(backend=backend, fullgraph=True, dynamic=False)
    pipe = make_causal_wan_pipeline()
    pipe.update_components(transformer=transformer, vae=vae)
    return pipe


def make_prompts(device="cpu"):
    """Embeddings of two prompts, [2, 1, text tokens, text dim]."""
    return torch.randn((2, 1, 16, TEXT_DIM), generator=torch.Generator().manual_seed(1)).to(device)


def make_state(**entries):
    """The state of a small stream of the first prompt."""
    state = PipelineState()
    state.values |= {"height": 32, "width": 48, "num_inference_steps": 3, "encoded_prompt": "prompt 0"}
    state.values |= {"generator": torch.Generator().manual_seed(2), "prompt_embeds": make_prompts()[0]} | entries
    return state


@torch.no_grad()
def run_steps(pipe, state, last=None):
    """One block, by every step after the text encoder's; up to the leaf step called `last`."""
    for name, step in pipe.blocks.sub_blocks.items():
        if name == "text_encoder":
            continue
        for leaf, part in step.sub_blocks.items() if step.sub_blocks else [(name, step)]:
            part(pipe, state)
            if leaf == last:
                return


def stream(pipe, before_block=lambda index: None, blocks=BLOCKS, last=None, **settings):
    """Latents of each block, and the graphs compiled up to its end; the prompt changes on the way.

    Each block up to its leaf step called `last`.
    """
    prompts = make_prompts(pipe.transformer.device)
    state = make_state(**settings)
    made, graphs = [], []
    for index in range(blocks):
        prompt = int(index >= CHANGED_AT)
        state.values |= {"block_idx": index, "prompt_embeds": prompts[prompt], "encoded_prompt": f"prompt {prompt}"}
        before_block(index)
        run_steps(pipe, state, last)
        made.append(state.get("current_denoised_latents"))
        graphs.append(counters["stats"]["unique_graphs"])
    return made, graphs
