"""What one step of the second stage is given: units of clips from the pool, noised, with their captions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ...wan.steps.few_step_schedule import make_few_step_schedule
from .block_parallel import Unit
from .latent_pool import BLOCKS, LatentPool
from .scenes import draw_caption

SHIFT = 5.0
# Sigmas of the sampler's own steps, from pure noise on.
OWN_SIGMAS = make_few_step_schedule(4, shift=SHIFT).sigmas
# Largest standard deviation of the noise on context, so that a stream's own small errors do not grow.
CONTEXT_NOISE = 0.25
# With `few_step`, the share of timesteps still drawn from all of them, so that other step counts stay usable.
_ANY_STEP_SHARE = 0.15


@dataclass
class Batch:
    """Rows are clips * units; a row's fields belong together.

    Attributes:
        samples: [rows, channels, 3, height, width], context or noised block.
        timesteps: [rows], 0 for context.
        targets: [noisy rows, channels, 3, height, width], the velocity noise - latents.
        noisy: [noisy rows], which rows those are.
        captions: the texts, each once.
        text_index: [rows], into `captions`.
        clips: [clips], which of the pool's they are.
    """

    samples: torch.Tensor
    timesteps: torch.Tensor
    targets: torch.Tensor
    noisy: torch.Tensor
    captions: list[str]
    text_index: torch.Tensor
    clips: torch.Tensor


def draw_batch(
    pool: LatentPool, units: Sequence[Unit], *, clips: int, few_step: bool, generator: torch.Generator
) -> Batch:
    """Draw a batch; `few_step` puts most of the weight on the sampler's own timesteps."""
    device = pool.latents.device
    chosen = torch.randint(len(pool.plans), (clips,), generator=generator)
    latents = gather_units(pool, units, chosen.to(device))
    noise = torch.randn(latents.shape, generator=generator).to(device)
    sigmas = _draw_sigmas((clips, len(units)), few_step, generator)
    is_noisy = torch.tensor([unit.noisy for unit in units]).expand(clips, -1)
    strength = CONTEXT_NOISE * torch.rand(sigmas.shape, generator=generator).square()
    wide = (clips, len(units), 1, 1, 1, 1)
    kept = torch.where(is_noisy, 1.0 - sigmas, 1.0).view(wide).to(device)
    added = torch.where(is_noisy, sigmas, strength).view(wide).to(device)
    noisy = is_noisy.flatten().nonzero()[:, 0].to(device)
    captions, text_index = _captions(pool, units, chosen.tolist(), generator)
    return Batch(
        samples=(kept * latents + added * noise).flatten(0, 1),
        timesteps=(1000.0 * torch.where(is_noisy, sigmas, 0.0)).flatten().to(device),
        targets=(noise - latents).flatten(0, 1)[noisy],
        noisy=noisy,
        captions=captions,
        text_index=text_index.to(device),
        clips=chosen.to(device),
    )


def gather_units(pool: LatentPool, units: Sequence[Unit], clips: torch.Tensor) -> torch.Tensor:
    """The clean latents of the units of clips, [clips, units, channels, 3, height, width]."""
    blocks = pool.latents[clips].unflatten(2, (BLOCKS, -1)).movedim(2, 1)
    latents = torch.stack([blocks[:, unit.block] for unit in units], dim=1)
    firsts = pool.first_contexts[clips]
    for index, unit in enumerate(units):
        if unit.reencoded:
            latents[:, index, :, 0] = firsts[:, unit.text_of - 2]
    return latents


def _draw_sigmas(shape: tuple[int, int], few_step: bool, generator: torch.Generator) -> torch.Tensor:
    # Evenly spread over the rows: a batch is small.
    spread = (torch.arange(shape[0] * shape[1]) + torch.rand((), generator=generator)) / (shape[0] * shape[1])
    even = spread[torch.randperm(len(spread), generator=generator)].view(shape)
    any_step = SHIFT * even / (1.0 + (SHIFT - 1.0) * even)
    if not few_step:
        return any_step
    own = torch.tensor(OWN_SIGMAS)
    steps = own[torch.randint(len(own), shape, generator=generator)]
    return torch.where(torch.rand(shape, generator=generator) < _ANY_STEP_SHARE, any_step, steps)


def _captions(
    pool: LatentPool, units: Sequence[Unit], clips: Sequence[int], generator: torch.Generator
) -> tuple[list[str], torch.Tensor]:
    captions: dict[str, int] = {}
    rows = []
    for clip in clips:
        said = {scene: draw_caption(scene, generator) for scene in (pool.scene(clip, block) for block in range(BLOCKS))}
        for unit in units:
            rows.append(captions.setdefault(said[pool.scene(clip, unit.text_of)], len(captions)))
    return list(captions), torch.tensor(rows)
