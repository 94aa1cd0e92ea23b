"""What the memory timeline needs to know about the built-in pipeline."""

from __future__ import annotations

from ..memory.pipeline_facts import PassLabel, PipelineFacts, StateAdvice

MEMORY_FACTS = PipelineFacts(
    pass_labels=(
        PassLabel("refill_context", "context"),
        PassLabel("denoise_block", "step", numbered=True),
    ),
    state_advice=(
        StateAdvice(
            "frame_cache_context",
            "it holds 1 + (context_frames - 1) * 4 pictures and stops growing when it is full; choose fewer "
            "context_frames to hold less.",
        ),
        StateAdvice(
            "current_denoised_latents",
            "it holds as many latent frames as context_frames says and then stops growing; choose fewer "
            "context_frames to hold less.",
        ),
    ),
)
