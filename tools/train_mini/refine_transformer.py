"""Third stage: the transformer learns to go on from its own guesses, in the sampler's four steps."""

from __future__ import annotations

from dataclasses import replace

import torch
from diffusers import AutoencoderKLWan

from .batches import draw_batch
from .checkpoint import TrainingState, step_generator
from .latent_pool import LatentPool
from .own_guesses import confuse_shapes, use_own_guesses
from .own_streams import OwnStreams, make_own_streams, use_own_streams
from .train_options import TrainOptions, autocast, learning_rate_at
from .train_transformer import AVERAGE_DECAY, CaptionedTransformer, descend
from .training_loop import Stage, run_stage

PEAK_RATE = 6e-4
CHECKPOINT = "refined_state.safetensors"


def refine_transformer(
    model: CaptionedTransformer, vae: AutoencoderKLWan, pool: LatentPool, options: TrainOptions
) -> list[tuple[int, float]]:
    """Train `model` on, or go on doing so; it holds the average at the end. Returns the losses."""
    own = make_own_streams(model, vae, pool, options)
    state = TrainingState.start(model.requires_grad_(True).train(), learning_rate=PEAK_RATE, weight_decay=0.01)
    stage = Stage("refinement", "loss", options.refine_steps, AVERAGE_DECAY, CHECKPOINT)
    run_stage(stage, state, options, lambda: _make_step(state, model, pool, own, options))
    model.eval().requires_grad_(False)
    return state.losses


def _make_step(
    state: TrainingState, model: CaptionedTransformer, pool: LatentPool, own: OwnStreams | None, options: TrainOptions
) -> torch.Tensor:
    """Even steps learn from whole own streams, odd ones from single own guesses about drawn clips."""
    generator = step_generator(options.seed, "refinement", state.step)
    units = model.parallel.units
    streams = own if state.step % 2 == 0 else None
    source = pool if streams is None else streams.truth
    batch = draw_batch(source, units, clips=options.transformer_batch, few_step=True, generator=generator)
    if streams is not None:
        batch = use_own_streams(batch, streams.made, units, generator)
    else:
        with torch.no_grad(), autocast(options.device):
            velocity = model(replace(batch, captions=confuse_shapes(batch.captions, generator)))
        batch = use_own_guesses(batch, velocity, units, generator)
    return descend(state, batch, options, learning_rate_at(state.step, options.refine_steps, PEAK_RATE))
