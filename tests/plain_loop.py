"""The loop that users write today: diffusers' own state, deep-copied on every call."""

from collections import deque

import torch
from diffusers.modular_pipelines import PipelineState

from streamblocks.stream.frames import to_uint8_frames


def run_plain_loop(pipe, settings, prompts, *, generator=None):
    """Frames of each block, uint8, from `state = pipe(state, ...)` without any of our stream code."""
    state = PipelineState()
    length = pipe.config.get("frame_cache_len")
    if length is not None:
        state.set("frame_cache_context", deque(maxlen=length))
    generator = generator or torch.Generator().manual_seed(settings.seed)
    known = set(pipe.blocks.input_names)
    frames = []
    for index, prompt in enumerate(prompts):
        inputs = {
            "prompt": [prompt],
            "block_idx": index,
            "num_blocks": len(prompts),
            "num_frames_per_block": settings.frames_per_block,
            "num_inference_steps": settings.steps,
            "generator": generator,
            "height": settings.height,
            "width": settings.width,
            "shift": settings.shift,
            "kv_policy": settings.kv_policy,
            "context_frames": settings.context_frames,
            "sink_frames": settings.sink_frames,
            "attention_bias": settings.attention_bias,
        }
        state = pipe(state, **{name: value for name, value in inputs.items() if name in known})
        frames.append(to_uint8_frames(state.values["videos"]))
    return frames
