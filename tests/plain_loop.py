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
        inputs = settings.pipeline_inputs() | {"prompt": [prompt], "block_idx": index, "generator": generator}
        state = pipe(state, **{name: value for name, value in inputs.items() if name in known})
        frames.append(to_uint8_frames(state.values["videos"]))
    return frames
