"""Sizes and lengths of the training: for two CPU cores, and for a card, which the shipped weights were made on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch


@dataclass(frozen=True)
class TrainOptions:
    """The settings of a run; the defaults are for two CPU cores, where they take less than two hours.

    Attributes:
        folder: checkpoints, pool of latents, losses and the finished pipeline go here.
        device: to train on.
        seed: of everything drawn.
        vae_steps: of the first stage.
        pool_clips: encoded before the second stage.
        transformer_steps: of the second stage.
        refine_steps: of the third stage.
        first_blocks: made by the transformer in many steps for the third stage.
        vae_batch: clips per step, as the lessons of `train_vae` take shares of.
        transformer_batch: clips of 4 blocks per step.
        save_every: steps between checkpoints.
    """

    folder: Path
    device: torch.device
    seed: int = 0
    vae_steps: int = 4000
    pool_clips: int = 3072
    transformer_steps: int = 3000
    refine_steps: int = 500
    first_blocks: int = 2048
    vae_batch: int = 4
    transformer_batch: int = 8
    save_every: int = 200


# Nine times the clips in all: what it takes until "circle" and "square", which differ in few pixels, are told apart.
SIZES_ON_A_CARD = {
    "pool_clips": 16384,
    "transformer_steps": 3374,
    "refine_steps": 800,
    "first_blocks": 16384,
    "transformer_batch": 64,
}


def learning_rate_at(step: int, total: int, peak: float, *, warm_up: int = 100, floor: float = 0.02) -> float:
    """Linear warm-up, then a cosine down to `floor * peak`."""
    if step < warm_up:
        return peak * (step + 1) / warm_up
    progress = (step - warm_up) / max(1, total - warm_up)
    return peak * (floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, progress))))


def autocast(device: torch.device) -> torch.autocast:
    """bfloat16 where a matrix product or a convolution gains from it."""
    return torch.autocast(device.type, torch.bfloat16)
