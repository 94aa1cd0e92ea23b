"""The few-step flow-matching schedule that Self-Forcing and Krea Realtime were distilled on."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...families.step_list import StepList

TRAIN_TIMESTEPS = 1000


@dataclass(frozen=True)
class FewStepSchedule:
    """Timesteps (0..1000) and sigmas (0..1) of the denoising steps, largest first; equal lengths."""

    timesteps: tuple[float, ...]
    sigmas: tuple[float, ...]


# Of a block that is its input.
NO_STEPS = FewStepSchedule((), ())


def shift_sigma(sigma: float, shift: float) -> float:
    """Shift one sigma towards noise: sigma' = shift * sigma / (1 + (shift - 1) * sigma).

    Source: Esser et al. 2024, "Scaling Rectified Flow Transformers", eq. 23; Wan 2.1 uses shift 5.
    """
    return shift * sigma / (1.0 + (shift - 1.0) * sigma)


def unshift_sigma(sigma: float, shift: float) -> float:
    """The sigma that `shift_sigma` makes `sigma` of."""
    return sigma / (shift - (shift - 1.0) * sigma)


def make_listed_schedule(listed: StepList, *, strength: float = 1.0, shift: float = 5.0) -> FewStepSchedule:
    """Build the schedule of one block from the makers' list.

    Their code looks each entry `n` up in the 1,000 shifted timesteps (entry `1000 - n`: "warped"), or gives the model
    the entry itself as its timestep and takes the sigma of the nearest of the 1,000 (CausVid and StreamDiffusionV2:
    `warp_denoising_step: false`).

    Args:
        listed: the timesteps.
        strength: each entry is multiplied by it.
        shift: the flow shift, greater than 0.

    Raises:
        ValueError: a value is out of range.
    """
    _check(strength, shift)
    entries = [strength * timestep for timestep in listed.timesteps]
    if listed.raw:
        places = [round(TRAIN_TIMESTEPS * unshift_sigma(entry / TRAIN_TIMESTEPS, shift)) for entry in entries]
        timesteps = tuple(entries)
        sigmas = tuple(shift_sigma(max(place, 1) / TRAIN_TIMESTEPS, shift) for place in places)
    else:
        sigmas = tuple(shift_sigma(entry / TRAIN_TIMESTEPS, shift) for entry in entries)
        timesteps = tuple(TRAIN_TIMESTEPS * sigma for sigma in sigmas)
    return FewStepSchedule(timesteps=timesteps, sigmas=sigmas)


def make_few_step_schedule(steps: int, *, strength: float = 1.0, shift: float = 5.0) -> FewStepSchedule:
    """Build the schedule of one block.

    The makers' server takes whole numbers evenly from `strength * 1000` down to 0 and looks each up in the
    1,000 shifted timesteps (entry `1000 - n`). Its list ends with a pass at t = 0; the step list the models
    were distilled on (1000, 937.5, 833.3, 625) is the same list without that pass.

    Args:
        steps: number of passes through the transformer per block, at least 1.
        strength: 1.0 starts from pure noise; lower values start from proportionally less noise (video input).
        shift: the flow shift, greater than 0.

    Raises:
        ValueError: a value is out of range.
    """
    if steps < 1:
        raise ValueError(f"steps is {steps}: at least 1 denoising step is needed.")
    _check(strength, shift)
    # Rounded before truncation: 0.7 * 1000 must give 700 despite floating-point error.
    start = strength * TRAIN_TIMESTEPS
    whole = [math.floor(round(start * (steps - i) / steps, 6)) for i in range(steps)]
    timesteps = tuple(TRAIN_TIMESTEPS * shift_sigma(n / TRAIN_TIMESTEPS, shift) for n in whole)
    # A pass at t = 0 takes the sigma of the table's smallest entry.
    sigmas = tuple(shift_sigma(max(n, 1) / TRAIN_TIMESTEPS, shift) for n in whole)
    return FewStepSchedule(timesteps=timesteps, sigmas=sigmas)


def _check(strength: float, shift: float) -> None:
    if not 0.0 < strength <= 1.0:
        raise ValueError(f"strength is {strength}: choose a value above 0 and up to 1.")
    if shift <= 0.0:
        raise ValueError(f"shift is {shift}: choose a value above 0 (Wan 2.1 uses 5).")
