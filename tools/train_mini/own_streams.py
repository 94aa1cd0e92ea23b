"""Streams that the transformer makes by itself, and beside each the truth that it should have made.

The first block of a stream begins in noise: no truth goes with it, because the shape may stand anywhere. So the stream
is made, its shape is found in the pictures, and the clip is drawn that has the right shape in the same place. From
these pairs the third stage learns to mend what the second gets wrong (as in DAgger, Ross et al. 2011: the learner's own
states, the teacher's answers).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from diffusers import AutoencoderKLWan

from ...wan.few_step_schedule import make_few_step_schedule
from .batches import SHIFT, Batch
from .block_parallel import BlockParallel, Unit, lay_out_units
from .checkpoint import load_made_with, save_whole, step_generator
from .clips import ClipPlan
from .drawn_truth import find_start
from .latent_pool import BLOCK_FRAMES, BLOCKS, LatentPool, encode_clips
from .progress import Progress
from .scenes import Scene, draw_caption, draw_scene
from .train_options import TrainOptions, autocast
from .train_transformer import CaptionedTransformer

MADE_BLOCKS = 2
_PART, _BATCH = 64, 16
_MADE_SHARE = 0.7
_LEAST_SIGMA = 0.6
_FILE = "own_streams.safetensors"
# Two blocks at a time: the second sees the first. While the first is made, the second's row is not looked at.
_FIRST = (Unit(0, True, 0, None, False, 0), Unit(1, True, 3, 0, False, 1))
_SECOND = (Unit(0, False, 0, None, False, 0), Unit(1, True, 3, 0, False, 1))


@dataclass
class OwnStreams:
    """What was made, and the truth.

    Attributes:
        made: the first two blocks of each stream, normalised latents [clips, 2, channels, 3, height, width].
        truth: clips of four blocks with the same scenes, in the same places.
    """

    made: torch.Tensor
    truth: LatentPool


def make_own_streams(
    model: CaptionedTransformer, vae: AutoencoderKLWan, pool: LatentPool, options: TrainOptions
) -> OwnStreams | None:
    """Make the streams, or read them; those whose shape cannot be found are left out. None where none are asked for.

    Raises:
        ValueError: no shape is found in any.
    """
    if not options.own_streams:
        return None
    path = options.folder / _FILE
    made_with = f"{options.own_streams} streams, seed {options.seed}, {options.transformer_steps} steps"
    scenes = [draw_scene(step_generator(options.seed, "own scenes", number)) for number in range(options.own_streams)]
    kept = load_made_with(path, made_with)
    if kept is None:
        parts: list[dict[str, torch.Tensor]] = []
        progress = Progress("own streams", 0, options.own_streams)
        for first in range(0, options.own_streams, _PART):
            part = _make_part(model, vae, pool, scenes[first : first + _PART], first, options)
            parts += [part] if part else []
            progress.show(min(first + _PART, options.own_streams), f"{sum(len(p['made']) for p in parts)} kept")
        if not parts:
            raise ValueError(
                f"none of {options.own_streams} own streams shows its shape: train the transformer longer, or choose 0 "
                "own streams."
            )
        kept = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
        save_whole(path, kept, {"made_with": made_with})
        model.parallel = BlockParallel(model.transformer, lay_out_units(BLOCKS))
    kept = {name: tensor.to(options.device) for name, tensor in kept.items()}
    plans = [
        ClipPlan(scenes[number], scenes[number], 0, float(x), float(y))
        for number, (x, y) in zip(kept["number"].tolist(), kept["start"].tolist(), strict=True)
    ]
    truth = LatentPool(kept["latents"], kept["first_contexts"], plans, pool.mean, pool.std)
    return OwnStreams(kept["made"], truth)


@torch.no_grad()
def _make_part(
    model: CaptionedTransformer,
    vae: AutoencoderKLWan,
    pool: LatentPool,
    scenes: Sequence[Scene],
    first: int,
    options: TrainOptions,
) -> dict[str, torch.Tensor]:
    generator = step_generator(options.seed, "own streams", first)
    captions = [draw_caption(scene, generator) for scene in scenes]
    shape = (len(scenes), pool.latents.shape[1], BLOCK_FRAMES, *pool.latents.shape[3:])
    blocks = roll_out(model, captions, shape, options, generator)
    mean, std = (torch.tensor(values, device=blocks.device).view(1, -1, 1, 1, 1) for values in (pool.mean, pool.std))
    latents = torch.cat(list(blocks.unbind(1)), dim=2) * std + mean
    pictures = torch.cat([vae.decode(part).sample for part in latents.split(_BATCH)])
    frames = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu()
    plans, kept = [], []
    for index, (clip, scene) in enumerate(zip(frames, scenes, strict=True)):
        start = find_start(clip, scene.direction)
        if start is not None:
            plans.append(ClipPlan(scene, scene, 0, *start))
            kept.append(index)
    if not plans:
        return {}
    encoded = [encode_clips(vae, plans[at : at + _BATCH], options.device) for at in range(0, len(plans), _BATCH)]
    truth, firsts = (torch.cat(parts) for parts in zip(*encoded, strict=True))
    return {
        "made": blocks[kept].cpu(),
        "latents": ((truth - mean) / std).cpu(),
        "first_contexts": ((firsts - mean[..., 0]) / std[..., 0]).cpu(),
        "number": torch.tensor([first + index for index in kept]),
        "start": torch.tensor([(plan.x, plan.y) for plan in plans]),
    }


def roll_out(
    model: CaptionedTransformer,
    captions: Sequence[str],
    shape: tuple[int, ...],
    options: TrainOptions,
    generator: torch.Generator,
) -> torch.Tensor:
    """Make two blocks of a stream per caption, as the sampler does; normalised latents [clips, 2, *shape[1:]]."""
    first = _make_block(model, _FIRST, captions, 0, torch.zeros(shape), options, generator)
    second = _make_block(model, _SECOND, captions, 1, first, options, generator)
    return torch.stack((first, second), dim=1)


def _make_block(
    model: CaptionedTransformer,
    units: Sequence[Unit],
    captions: Sequence[str],
    made: int,
    context: torch.Tensor,
    options: TrainOptions,
    generator: torch.Generator,
) -> torch.Tensor:
    """Block number `made`; `context` stands in the other row."""
    model.parallel = BlockParallel(model.transformer, units)
    sigmas = make_few_step_schedule(4, shift=SHIFT).sigmas
    device = options.device
    draw = lambda: torch.randn(context.shape, generator=generator).to(device)  # noqa: E731
    sample = draw()
    rows = torch.arange(2 * len(captions), device=device)
    guess = sample
    for sigma, later in zip(sigmas, (*sigmas[1:], 0.0), strict=True):
        pair = [context.to(device), context.to(device)]
        pair[made] = sample
        times = torch.zeros(len(captions), 2, device=device)
        times[:, made] = 1000.0 * sigma
        batch = Batch(
            samples=torch.stack(pair, dim=1).flatten(0, 1),
            timesteps=times.flatten(),
            targets=sample,
            noisy=rows[made::2],
            captions=list(captions),
            text_index=rows // 2,
            clips=rows[::2] // 2,
        )
        with autocast(device):
            velocity = model(batch)
        guess = sample - sigma * velocity
        if later:
            sample = (1.0 - later) * guess + later * draw()
    return guess


def use_own_streams(batch: Batch, made: torch.Tensor, units: Sequence[Unit], generator: torch.Generator) -> Batch:
    """Put what was made in place of truth in most rows of the first two blocks; targets lead to the truth.

    Args:
        batch: drawn from the truth of own streams.
        made: of `OwnStreams`.
        units: of a clip.
        generator: of the choice.
    """
    clips = len(batch.clips)
    samples = batch.samples.unflatten(0, (clips, len(units))).clone()
    is_noisy = torch.tensor([unit.noisy for unit in units])
    targets = batch.targets.unflatten(0, (clips, -1)).clone()
    sigmas = (batch.timesteps / 1000.0).view(clips, len(units))
    places = is_noisy.cumsum(0) - 1
    for index, unit in enumerate(units):
        chosen = (torch.rand(clips, generator=generator) < _MADE_SHARE).to(samples.device)
        if unit.block >= MADE_BLOCKS:
            continue
        one = made[batch.clips, unit.block]
        if not unit.noisy:
            first = 1 if unit.reencoded else 0
            samples[chosen, index, :, first:] = one[chosen, :, first:]
            continue
        sigma = sigmas[:, index].view(-1, 1, 1, 1, 1)
        # All noise holds nothing that could be mended; with little noise the way to the truth would be very steep.
        chosen &= (sigmas[:, index] > _LEAST_SIGMA) & (sigmas[:, index] < 0.99)
        truth = samples[:, index] - sigma * targets[:, places[index]]
        noised = samples[:, index] + (1.0 - sigma) * (one - truth)
        samples[chosen, index] = noised[chosen]
        targets[chosen, places[index]] = ((noised - truth) / sigma)[chosen]
    return replace(batch, samples=samples.flatten(0, 1), targets=targets.flatten(0, 1))
