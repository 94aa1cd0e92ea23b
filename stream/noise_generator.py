"""The generator of a stream's noise, which all 64 bits of its seed tell from others."""

from __future__ import annotations

import random

import torch

# torch's engine on a CPU, mt19937, takes 32 bits of a seed and leaves the others out.
_ENGINE_BITS = 32
_LARGEST = 2**64 - 1
# What `torch.Generator.get_state` of a CPU begins with: uint64 seed, int32 left, int32 seeded, uint64 next, and the 624
# words of mt19937 in 64 bits each (`CPUGeneratorImplStateLegacy` in ATen/CPUGeneratorImpl.cpp).
_WORDS = slice(3, 3 + 624)


def check_seed(seed: int) -> None:
    """Raise ValueError, one sentence, for a seed that is no unsigned number of 64 bits."""
    if not 0 <= seed <= _LARGEST:
        raise ValueError(f"seed is {seed}: choose 0 to {_LARGEST}.")


def make_noise_generator(seed: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator at the beginning of a seed's noise.

    Up to 2^32 - 1 it is torch's own. On a CPU larger ones begin from a state that both words of the seed are in:
    `init_by_array` of Matsumoto and Nishimura's mt19937ar.c (2002), with the lower word first. Generators of other
    devices take 64 bits.

    Args:
        seed: 0 to 2^64 - 1.
        device: of the noise.

    Raises:
        ValueError: the seed is out of range.
    """
    check_seed(seed)
    generator = torch.Generator(device).manual_seed(seed)
    if generator.device.type != "cpu" or seed < 2**_ENGINE_BITS:
        return generator
    state = generator.get_state()
    # Python's own generator of a whole number is made by the same `init_by_array`, and the last entry is a position.
    words = random.Random(seed).getstate()[1][:-1]
    state.view(torch.int64)[_WORDS] = torch.tensor(words, dtype=torch.int64)
    generator.set_state(state)
    return generator
