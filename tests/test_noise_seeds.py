"""The noise of seeds: those of 32 bits as it always was, and of 64 bits each its own."""

import hashlib

import numpy as np
import pytest
import torch

from streamblocks.stream.noise_generator import make_noise_generator
from streamblocks.stream.settings import StreamSettings

# Of torch.Generator().manual_seed(seed), before seeds of 64 bits were told from each other.
KNOWN = {
    0: "79276078d05527a3",
    7: "5f9ac568a82fbecf",
    2**31: "9d89952dffb7a72b",
    2**32 - 1: "2f0e35cf4df24f6b",
}
LARGE = (2**32, 2**32 + 7, 2**33, 2**33 + 2**32, 2**63, 2**64 - 1)


def noise(seed):
    made = torch.randn(1, 16, 3, 8, 8, generator=make_noise_generator(seed))
    return hashlib.sha256(made.numpy().tobytes()).hexdigest()[:16]


def test_seeds_of_32_bits_keep_their_noise():
    assert {seed: noise(seed) for seed in KNOWN} == KNOWN


def test_seeds_that_differ_in_any_bit_give_different_noise():
    made = [noise(seed) for seed in LARGE]
    assert len({*made, *KNOWN.values()}) == len(made) + len(KNOWN)
    assert made == [noise(seed) for seed in LARGE]


@pytest.mark.parametrize("seed", LARGE)
def test_large_seeds_are_those_of_the_reference_code(seed):
    """numpy's legacy generator has `init_by_array`, and its raw words come out of torch's engine."""
    theirs = np.random.RandomState([seed % 2**32, seed // 2**32])
    words = theirs._bit_generator.random_raw(1500)
    ours = torch.randint(0, 2**24, (1500,), generator=make_noise_generator(seed))
    assert ours.tolist() == (words % 2**24).tolist()


def test_a_generator_of_a_large_seed_goes_on_from_its_state():
    generator, other = make_noise_generator(2**40), torch.Generator()
    torch.randn(7, generator=generator)
    other.set_state(generator.get_state())
    assert torch.equal(torch.randn(900, generator=generator), torch.randn(900, generator=other))


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_named(seed):
    with pytest.raises(ValueError, match=f"^seed is {seed}: choose 0 to 18446744073709551615"):
        StreamSettings(seed=seed)
