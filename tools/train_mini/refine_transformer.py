"""Third stage: the transformer learns to continue from its own guesses, in the sampler's four steps."""

from __future__ import annotations

from dataclasses import replace

import torch

from .batches import draw_batch
from .checkpoint import TrainingState, step_generator
from .first_blocks import FirstBlocks, make_first_blocks, use_first_blocks
from .latent_pool import LatentPool
from .own_guesses import confuse_shapes, use_own_guesses
from .train_options import TrainOptions, autocast, learning_rate_at
from .train_transformer import AVERAGE_DECAY, CaptionedTransformer, descend
from .training_loop import Stage, run_stage

PEAK_RATE = 6e-4
CHECKPOINT = "refined_state.safetensors"


def refine_transformer(model: CaptionedTransformer, pool: LatentPool, options: TrainOptions) -> list[tuple[int, float]]:
    """Continue training `model`, or resume that; it holds the average at the end. Returns the losses."""
    firsts = make_first_blocks(model, pool, options)
    known = pool.first(len(firsts.ends))
    state = TrainingState.start(model.requires_grad_(True).train(), learning_rate=PEAK_RATE, weight_decay=0.01)
    stage = Stage("refinement", "loss", options.refine_steps, AVERAGE_DECAY, CHECKPOINT)
    run_stage(stage, state, options, lambda: _make_step(state, model, known, firsts, options))
    model.eval().requires_grad_(False)
    return state.losses


def _make_step(
    state: TrainingState, model: CaptionedTransformer, pool: LatentPool, firsts: FirstBlocks, options: TrainOptions
) -> torch.Tensor:
    """Every other step learns from own guesses about drawn clips; all of them from the first blocks."""
    generator = step_generator(options.seed, "refinement", state.step)
    units = model.parallel.units
    batch = draw_batch(pool, units, clips=options.transformer_batch, few_step=True, generator=generator)
    if state.step % 2:
        with torch.no_grad(), autocast(options.device):
            velocity = model(replace(batch, captions=confuse_shapes(batch.captions, generator)))
        batch = use_own_guesses(batch, velocity, units, generator)
    batch = use_first_blocks(batch, firsts, units, generator)
    return descend(state, batch, options, learning_rate_at(state.step, options.refine_steps, PEAK_RATE))
