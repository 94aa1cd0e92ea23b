"""Batches as the sampler makes them: from the transformer's own guesses, not from the truth.

In four steps each pass starts from the noised guess of the pass before, and each block from the guess of the block
before. Trained on noised truth alone, a transformer has never seen its own blur, and passes a distorted shape on from
block to block. Here one pass guesses; the next is trained to find the truth behind the guesses (as in scheduled
sampling, Bengio et al. 2015, and close to Self Forcing, Huang et al. 2025, which trains on whole roll-outs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from .batches import OWN_SIGMAS, Batch
from .block_parallel import Unit
from .scenes import SHAPES

_GUESS_SHARE = 0.7
_CONTEXT_SHARE = 0.5
_CONFUSED_SHARE = 0.5
# A guess from more noise than this is not a picture yet; the sampler never uses one as context.
_LARGEST_CONTEXT_SIGMA = 0.84


def confuse_shapes(captions: Sequence[str], generator: torch.Generator) -> list[str]:
    """Captions to guess by: half of them name another shape, so that the shape is what has to be corrected.

    The truth behind the noise shows its shape to a transformer, which then has no need of the word.
    """
    confused = []
    for caption in captions:
        other = SHAPES[int(torch.randint(len(SHAPES), (), generator=generator))]
        words = [other if word in SHAPES else word for word in caption.split()]
        chosen = bool(torch.rand((), generator=generator) < _CONFUSED_SHARE)
        confused.append(" ".join(words) if chosen else caption)
    return confused


def use_own_guesses(batch: Batch, velocity: torch.Tensor, units: Sequence[Unit], generator: torch.Generator) -> Batch:
    """Put guesses in place of truth in some rows.

    Args:
        batch: drawn with `few_step`.
        velocity: [noisy rows, channels, 3, height, width], what the transformer made of it.
        units: of a clip.
        generator: of the choice and the noise.

    Returns:
        A batch whose noisy rows, in 70 % of cases, are the guess noised to the step after theirs, and whose context
        rows, in half the cases where there is a usable guess of their block, are that guess. Targets lead to the truth.
    """
    noised, sigma = batch.samples[batch.noisy], batch.timesteps[batch.noisy] / 1000.0
    guess, latents = noised - _wide(sigma) * velocity, noised - _wide(sigma) * batch.targets
    alone = torch.tensor([unit.predecessor is None for unit in units if unit.noisy])
    behind, is_later = _step_behind(sigma.cpu(), alone.repeat(len(sigma) // len(alone)), generator)
    behind, is_later = behind.to(sigma), is_later.to(sigma.device)
    noise = torch.randn(guess.shape, generator=generator).to(guess)
    renoised = (1.0 - _wide(behind)) * guess + _wide(behind) * noise
    samples, timesteps = _with_context(batch, guess, sigma, units, generator), batch.timesteps.clone()
    samples[batch.noisy] = torch.where(_wide(is_later), renoised, noised)
    timesteps[batch.noisy] = 1000.0 * behind
    targets = (samples[batch.noisy] - latents) / _wide(behind)
    return replace(batch, samples=samples, timesteps=timesteps, targets=targets)


def _step_behind(
    sigma: torch.Tensor, alone: torch.Tensor, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sigma each row goes on to, or stays at, and whether it goes on.

    Rows `alone`, without a context that says where the shape is, go on from the last step but one only: from more noise
    the guess is a blur of all places, and training on it leads to empty pictures.
    """
    own = torch.tensor(OWN_SIGMAS)
    distance, step = (sigma[:, None] - own).abs().min(dim=1)
    goes_on = torch.rand(sigma.shape, generator=generator) < _GUESS_SHARE
    is_later = goes_on & (distance < 1e-3) & (step < len(own) - 1) & (~alone | (step == len(own) - 2))
    return torch.where(is_later, own[(step + 1).clamp(max=len(own) - 1)], sigma), is_later


def _with_context(
    batch: Batch, guess: torch.Tensor, sigma: torch.Tensor, units: Sequence[Unit], generator: torch.Generator
) -> torch.Tensor:
    """All samples, with guesses in some context rows; a picture encoded as an image stays true."""
    guesses, sigmas = batch.samples.clone(), batch.timesteps / 1000.0
    guesses[batch.noisy], sigmas[batch.noisy] = guess, sigma
    samples = batch.samples.unflatten(0, (-1, len(units))).clone()
    guesses, sigmas = guesses.view_as(samples), sigmas.view(len(samples), len(units))
    source_of = {unit.block: index for index, unit in reversed(list(enumerate(units))) if unit.noisy}
    for index, unit in enumerate(units):
        chosen = torch.rand(len(samples), generator=generator) < _CONTEXT_SHARE
        if not unit.noisy:
            source, first = source_of[unit.block], 1 if unit.reencoded else 0
            chosen = chosen.to(sigmas.device) & (sigmas[:, source] < _LARGEST_CONTEXT_SIGMA)
            samples[chosen, index, :, first:] = guesses[chosen, source, :, first:]
    return samples.flatten(0, 1)


def _wide(values: torch.Tensor) -> torch.Tensor:
    """[rows] to [rows, 1, 1, 1, 1]."""
    return values.view(-1, 1, 1, 1, 1)
