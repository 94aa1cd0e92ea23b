"""What a block starts from: noise, and the latents of an input video."""

from __future__ import annotations

import torch

from .few_step_schedule import FewStepSchedule


def noise_input(noise: torch.Tensor, schedule: FewStepSchedule, latents: torch.Tensor | None) -> torch.Tensor:
    """(1 - sigma) * latents + sigma * noise, sigma of the schedule's first step; the noise where there is no input.

    This is what Krea's server and diffusers' modular Krea pipeline start a block of video to video from. A strength
    scales the step list, so a block has as many passes at any strength, and none at 0, where it is its input.

    Args:
        noise: of the block.
        schedule: of the block.
        latents: of the input, the noise's shape; None without one.

    Raises:
        ValueError: there is neither an input nor a step.
    """
    if latents is None:
        if not schedule.sigmas:
            raise ValueError("strength is 0 and there are no input_pictures: give them, or a strength above 0.")
        return noise
    sigma = schedule.sigmas[0] if schedule.sigmas else 0.0
    # Of whole noise, nothing of the input is left; the same values as without one, to the bit.
    return noise if sigma == 1.0 else (1.0 - sigma) * latents.to(noise) + sigma * noise
