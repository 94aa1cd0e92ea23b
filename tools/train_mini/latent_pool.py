"""A pool of encoded clips, so that the transformer's steps do not have to run the VAE."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan

from .checkpoint import load_made_with, save_whole, step_generator
from .clips import ClipPlan, draw_clips, draw_plan
from .progress import Progress
from .scenes import Scene
from .train_options import TrainOptions

BLOCKS = 4
BLOCK_FRAMES = 3
LATENT_FRAMES = BLOCKS * BLOCK_FRAMES
PICTURES = 1 + 4 * (LATENT_FRAMES - 1)
# The first picture of each block but the first.
CUTS = tuple(1 + 4 * (BLOCK_FRAMES * block - 1) for block in range(1, BLOCKS))
CHANGE_SHARE = 0.4
_PART = 256
_BATCH = 16


@dataclass
class LatentPool:
    """Encoded clips of four blocks.

    Attributes:
        latents: float32 [clips, channels, 12, 8, 8], zero mean and unit variance per channel.
        first_contexts: what `recompute` puts first in the context of blocks 2 and 3, a single picture encoded as an
            image: [clips, 2, channels, 8, 8].
        plans: what the clips show.
        mean: of the VAE's latents, per channel.
        std: the same.
    """

    latents: torch.Tensor
    first_contexts: torch.Tensor
    plans: list[ClipPlan]
    mean: list[float]
    std: list[float]

    def scene(self, clip: int, block: int) -> Scene:
        """What block `block` of a clip shows."""
        plan = self.plans[clip]
        return plan.after if CUTS_OF_BLOCK[block] >= plan.cut else plan.before

    def first(self, clips: int) -> LatentPool:
        """The first `clips` of it."""
        return replace(
            self,
            latents=self.latents[:clips],
            first_contexts=self.first_contexts[:clips],
            plans=self.plans[:clips],
        )


# First picture of every block.
CUTS_OF_BLOCK = (0, *CUTS)


def make_pool(vae: AutoencoderKLWan, options: TrainOptions) -> LatentPool:
    """Encode the pool, or what is missing of it, part by part; everything on the options' device."""
    parts, plans = [], []
    count = -(-options.pool_clips // _PART)
    progress = Progress("latents", 0, count)
    for part in range(count):
        size = min(_PART, options.pool_clips - part * _PART)
        generator = step_generator(options.seed, "pool", part)
        drawn = [draw_plan(generator, cuts=CUTS, change_share=CHANGE_SHARE) for _ in range(size)]
        parts.append(_encoded_part(vae, drawn, options.folder / f"pool_{part:02}.safetensors", options))
        plans += drawn
        progress.show(part + 1, f"{len(plans)} clips encoded")
    latents = torch.cat([part["latents"].float() for part in parts]).to(options.device)
    firsts = torch.cat([part["first_contexts"].float() for part in parts]).to(options.device)
    mean, std = latents.mean((0, 2, 3, 4)), latents.std((0, 2, 3, 4))
    shape = (1, -1, 1, 1, 1)
    return LatentPool(
        latents=(latents - mean.view(shape)) / std.view(shape),
        first_contexts=(firsts - mean.view(1, 1, -1, 1, 1)) / std.view(1, 1, -1, 1, 1),
        plans=plans,
        mean=mean.tolist(),
        std=std.tolist(),
    )


def _encoded_part(
    vae: AutoencoderKLWan, plans: list[ClipPlan], path: Path, options: TrainOptions
) -> dict[str, torch.Tensor]:
    made_with = f"{len(plans)} clips, seed {options.seed}, VAE of {options.vae_steps} steps"
    kept = load_made_with(path, made_with)
    if kept is not None:
        return kept
    encoded = [_encode(vae, plans[start : start + _BATCH], options.device) for start in range(0, len(plans), _BATCH)]
    part = {
        "latents": torch.cat([latents for latents, _ in encoded]).half().cpu(),
        "first_contexts": torch.cat([firsts for _, firsts in encoded]).half().cpu(),
    }
    save_whole(path, part, {"made_with": made_with})
    return part


@torch.no_grad()
def _encode(vae: AutoencoderKLWan, plans: list[ClipPlan], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    clip = draw_clips(plans, PICTURES, device)
    latents = vae.encode(clip).latent_dist.mode()
    # The last picture of latent frame 3 * block - 3: the oldest of the 9 that the pipeline keeps.
    oldest = [4 * (BLOCK_FRAMES * block - BLOCK_FRAMES) for block in (2, 3)]
    pictures = torch.stack([clip[:, :, place] for place in oldest], dim=1).flatten(0, 1).unsqueeze(2)
    firsts = vae.encode(pictures).latent_dist.mode()[:, :, 0]
    return latents, firsts.unflatten(0, (len(plans), 2))
