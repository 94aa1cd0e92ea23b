"""The third stage's batches start from guesses and lead to the truth."""

import pytest
import torch

from streamblocks.tools.train_mini.batches import draw_batch, gather_units
from streamblocks.tools.train_mini.block_parallel import lay_out_units
from streamblocks.tools.train_mini.clips import draw_plan
from streamblocks.tools.train_mini.latent_pool import BLOCKS, CUTS, LatentPool
from streamblocks.tools.train_mini.own_guesses import confuse_shapes, use_own_guesses
from streamblocks.tools.train_mini.scenes import SHAPES
from streamblocks.wan.steps.few_step_schedule import make_few_step_schedule

UNITS = lay_out_units(BLOCKS)
CLIPS = 16
OWN = torch.tensor(make_few_step_schedule(4).sigmas)


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(1)
    plans = [draw_plan(generator, cuts=CUTS, change_share=0.5)]
    latents = torch.randn(1, 8, 3 * BLOCKS, 4, 4, generator=generator)
    return LatentPool(latents, torch.randn(1, 2, 8, 4, 4, generator=generator), plans, [0.0] * 8, [1.0] * 8)


def drawn(pool, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return draw_batch(pool, UNITS, clips=CLIPS, few_step=True, generator=generator), generator


def wide(values):
    return values.view(-1, 1, 1, 1, 1)


@pytest.mark.parametrize("error", [0.0, 0.5])
def test_targets_lead_from_wherever_a_row_starts_to_the_truth(pool, error):
    batch, generator = drawn(pool)
    velocity = batch.targets + error * torch.randn(batch.targets.shape, generator=generator)
    made = use_own_guesses(batch, velocity, UNITS, generator)
    sigma = wide(made.timesteps[made.noisy] / 1000.0)
    truth = batch.samples[batch.noisy] - wide(batch.timesteps[batch.noisy] / 1000.0) * batch.targets
    assert torch.allclose(made.samples[made.noisy] - sigma * made.targets, truth, atol=1e-4)


def test_rows_go_on_by_one_step_from_the_guess(pool):
    batch, generator = drawn(pool)
    # The guess: zero everywhere.
    velocity = batch.samples[batch.noisy] / wide(batch.timesteps[batch.noisy] / 1000.0)
    made = use_own_guesses(batch, velocity, UNITS, generator)
    before, behind = (some.timesteps[some.noisy] / 1000.0 for some in (batch, made))
    moved = before != behind
    for old, new in zip(before[moved], behind[moved], strict=True):
        step = int((OWN - old).abs().argmin())
        assert torch.isclose(OWN[step + 1], new)
    # Three of four own steps have one behind them, 85 % of the rows are at one, 70 % go on; two rows in five are alone.
    assert 0.3 < moved.float().mean() < 0.55
    alone = torch.tensor([unit.predecessor is None for unit in UNITS if unit.noisy]).repeat(CLIPS)
    assert torch.equal(before[moved & alone], OWN[-2].expand(int((moved & alone).sum())))
    # Nothing of the truth is left in them: their noise alone.
    samples = made.samples[made.noisy][moved] / wide(behind[moved])
    assert abs(float(samples.std()) - 1.0) < 0.05
    assert torch.equal(made.samples[made.noisy][~moved], batch.samples[batch.noisy][~moved])


def test_context_is_a_guess_of_its_own_block_or_stays(pool):
    batch, generator = drawn(pool)
    velocity = batch.targets
    made = use_own_guesses(batch, velocity, UNITS, generator)
    truth = gather_units(pool, UNITS, torch.zeros(CLIPS, dtype=torch.long))
    old, new = (some.samples.unflatten(0, (CLIPS, -1)) for some in (batch, made))
    replaced = 0
    for index, unit in enumerate(UNITS):
        if unit.noisy:
            continue
        first = 1 if unit.reencoded else 0
        assert torch.equal(old[:, index, :, :first], new[:, index, :, :first])
        for clip in range(CLIPS):
            if not torch.equal(old[clip, index], new[clip, index]):
                replaced += 1
                # With a perfect velocity the guess is the truth.
                assert torch.allclose(new[clip, index, :, first:], truth[clip, index, :, first:], atol=1e-4)
    assert replaced > 0
    assert torch.equal(batch.timesteps.view(CLIPS, -1)[:, 0], made.timesteps.view(CLIPS, -1)[:, 0])


def test_half_the_captions_name_another_shape():
    captions = ["a red circle moves right", "the blue square goes up on white"] * 300
    confused = confuse_shapes(captions, torch.Generator().manual_seed(0))
    changed = [(old, new) for old, new in zip(captions, confused, strict=True) if old != new]
    # Half are chosen, and a third of those draw the shape they have.
    assert 0.25 < len(changed) / len(captions) < 0.42
    for old, new in changed:
        places = [place for place, pair in enumerate(zip(old.split(), new.split(), strict=True)) if pair[0] != pair[1]]
        assert places == [2] and new.split()[2] in SHAPES
