"""First blocks made in many small steps, from which the transformer learns to make them in four.

A stream begins in noise that does not say where the shape is. Trained on drawn clips, a transformer answers strong
noise with the mean of all places, and four steps never leave that blur. The flow that the second stage has learnt is
therefore followed in many steps, from noise to one picture; the third stage learns to reach its end from wherever the
sampler's steps meet it (ODE regression, as in CausVid, Yin et al. 2024, and at the start of Self Forcing, Huang et al.
2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ...wan.steps.few_step_schedule import make_few_step_schedule
from .batches import OWN_SIGMAS, SHIFT, Batch
from .block_parallel import FIRST_BLOCK, BlockParallel, Unit, lay_out_units
from .checkpoint import load_made_with, save_whole, step_generator
from .latent_pool import BLOCK_FRAMES, BLOCKS, LatentPool
from .progress import Progress
from .scenes import draw_caption
from .train_options import TrainOptions, autocast
from .train_transformer import CaptionedTransformer

# Steps of the flow for each of the sampler's steps, so that it passes through the same sigmas.
_STEPS_BETWEEN = 8
_PART = 256
_FILE = "first_blocks.safetensors"


@dataclass
class FirstBlocks:
    """Ways from noise to a first block, for the first clips of the pool; normalised latents.

    Attributes:
        points: where each way stands at the sampler's sigmas, [clips, 4, channels, 3, height, width].
        ends: where it ends, [clips, channels, 3, height, width].
    """

    points: torch.Tensor
    ends: torch.Tensor


def make_first_blocks(model: CaptionedTransformer, pool: LatentPool, options: TrainOptions) -> FirstBlocks:
    """Follow the flow for `options.first_blocks` clips' captions, or read what was made.

    Raises:
        ValueError: none are asked for.
    """
    if options.first_blocks < 1:
        raise ValueError(f"first_blocks is {options.first_blocks}: the third stage needs 1 or more to learn from.")
    path = options.folder / _FILE
    count = min(options.first_blocks, len(pool.plans))
    trained = f"{options.transformer_steps} steps of {options.transformer_batch} clips"
    made_with = f"{count} blocks, seed {options.seed}, {trained}"
    kept = load_made_with(path, made_with)
    if kept is None:
        model.parallel = BlockParallel(model.transformer, (FIRST_BLOCK,))
        progress = Progress("first blocks", 0, count)
        parts = []
        for first in range(0, count, _PART):
            generator = step_generator(options.seed, "first blocks", first)
            clips = range(first, min(first + _PART, count))
            captions = [draw_caption(pool.scene(clip, 0), generator) for clip in clips]
            noise = torch.randn(len(clips), *pool.latents[0, :, :BLOCK_FRAMES].shape, generator=generator)
            parts.append(follow_flow(model, captions, noise.to(options.device)))
            progress.show(first + len(captions), "made")
        model.parallel = BlockParallel(model.transformer, lay_out_units(BLOCKS))
        points, ends = (torch.cat(each) for each in zip(*parts, strict=True))
        kept = {"points": points.half().cpu(), "ends": ends.half().cpu()}
        save_whole(path, kept, {"made_with": made_with})
    return FirstBlocks(kept["points"].float().to(options.device), kept["ends"].float().to(options.device))


@torch.no_grad()
def follow_flow(
    model: CaptionedTransformer, captions: Sequence[str], noise: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """From noise [clips, channels, 3, height, width] along the model's velocity, by Euler's method.

    Returns:
        The points at the sampler's sigmas [clips, 4, channels, 3, height, width], and the ends.
    """
    sigmas = make_few_step_schedule(len(OWN_SIGMAS) * _STEPS_BETWEEN, shift=SHIFT).sigmas
    sample, points = noise, []
    for step, (sigma, later) in enumerate(zip(sigmas, (*sigmas[1:], 0.0), strict=True)):
        if step % _STEPS_BETWEEN == 0:
            points.append(sample)
        sample = sample + (later - sigma) * guess_velocity(model, captions, sample, sigma)
    return torch.stack(points, dim=1), sample


def guess_velocity(
    model: CaptionedTransformer, captions: Sequence[str], sample: torch.Tensor, sigma: float
) -> torch.Tensor:
    """The velocity of first blocks at `sigma`; the model is laid out for single first blocks."""
    rows = torch.arange(len(captions), device=sample.device)
    batch = Batch(
        samples=sample,
        timesteps=torch.full((len(captions),), 1000.0 * sigma, device=sample.device),
        targets=sample,
        noisy=rows,
        captions=list(captions),
        text_index=rows,
        clips=rows,
    )
    with autocast(sample.device):
        return model(batch)


def use_first_blocks(batch: Batch, made: FirstBlocks, units: Sequence[Unit], generator: torch.Generator) -> Batch:
    """Put points of the flow in place of noised first blocks, all but one of each clip; their targets lead to its end.

    Args:
        batch: drawn from clips that `made` has.
        made: in the order of the pool.
        units: of a clip.
        generator: of which points.
    """
    sigmas = torch.tensor(OWN_SIGMAS)
    clips = len(batch.clips)
    samples = batch.samples.unflatten(0, (clips, len(units))).clone()
    timesteps = batch.timesteps.view(clips, len(units)).clone()
    targets = batch.targets.unflatten(0, (clips, -1)).clone()
    places = torch.tensor([unit.noisy for unit in units]).cumsum(0) - 1
    firsts = [index for index, unit in enumerate(units) if unit == FIRST_BLOCK]
    for index in firsts[1:]:
        step = torch.randint(len(sigmas), (clips,), generator=generator)
        sigma = sigmas[step].to(samples)
        points = made.points[batch.clips, step.to(batch.clips.device)]
        samples[:, index] = points
        timesteps[:, index] = 1000.0 * sigma
        targets[:, places[index]] = (points - made.ends[batch.clips]) / sigma.view(-1, 1, 1, 1, 1)
    return replace(batch, samples=samples.flatten(0, 1), timesteps=timesteps.flatten(), targets=targets.flatten(0, 1))
