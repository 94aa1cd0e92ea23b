"""The ways from noise to a first block that the third stage learns from."""

from __future__ import annotations

import pytest
import torch

from streamblocks.tools.train_mini import first_blocks
from streamblocks.tools.train_mini.batches import draw_batch
from streamblocks.tools.train_mini.block_parallel import FIRST_BLOCK, FIRST_BLOCK_COPIES, BlockParallel, lay_out_units
from streamblocks.tools.train_mini.clips import draw_plan
from streamblocks.tools.train_mini.first_blocks import (
    FirstBlocks,
    follow_flow,
    guess_velocity,
    make_first_blocks,
    use_first_blocks,
)
from streamblocks.tools.train_mini.latent_pool import BLOCKS, CUTS, LatentPool
from streamblocks.tools.train_mini.train_options import TrainOptions
from streamblocks.tools.train_mini.train_transformer import CaptionedTransformer
from streamblocks.wan.steps.few_step_schedule import make_few_step_schedule

UNITS = lay_out_units(BLOCKS)
OWN = torch.tensor(make_few_step_schedule(4).sigmas)
CLIPS = 5


@pytest.fixture(scope="module")
def pool():
    generator = torch.Generator().manual_seed(3)
    plans = [draw_plan(generator, cuts=CUTS, change_share=0.5) for _ in range(CLIPS)]
    latents = torch.randn(CLIPS, 8, 3 * BLOCKS, 4, 4, generator=generator)
    return LatentPool(latents, torch.randn(CLIPS, 2, 8, 4, 4, generator=generator), plans, [0.0] * 8, [1.0] * 8)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = CaptionedTransformer().eval()
    # An untrained model's velocity is small; here it has to matter.
    torch.nn.init.normal_(model.transformer.proj_out.weight, std=0.2)
    return model


def options(folder, **changes):
    return TrainOptions(folder=folder, device=torch.device("cpu"), **{"first_blocks": 3, **changes})


def test_a_straight_flow_is_followed_to_its_end(model, monkeypatch):
    noise, end = torch.randn(2, 2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0)).unbind(0)
    seen = []

    def straight(model, captions, sample, sigma):
        seen.append(sigma)
        return noise - end

    monkeypatch.setattr(first_blocks, "guess_velocity", straight)
    points, found = follow_flow(model, ["a red circle moves right"] * 2, noise)
    # From sigma 1, which the schedule rounds: the last step still ends at 0.
    assert torch.allclose(found, end + (1.0 - seen[0]) * (noise - end), atol=1e-5)
    for place, sigma in enumerate(OWN.tolist()):
        assert torch.allclose(points[:, place], sigma * noise + (1.0 - sigma) * found, atol=1e-3)
    assert len(seen) == 32 and seen == sorted(seen, reverse=True)
    assert set(make_few_step_schedule(4).sigmas) <= set(seen)


def test_points_and_ends_are_those_of_the_models_own_velocity(model, pool, tmp_path):
    made = make_first_blocks(model, pool, options(tmp_path))
    assert made.points.shape == (3, 4, 8, 3, 4, 4) and made.ends.shape == (3, 8, 3, 4, 4)
    # The layout of whole clips is back in place.
    assert model.parallel.units == UNITS
    assert float((made.points[:, 0] - made.ends).std()) > 0.1
    assert not torch.allclose(made.ends[0], made.ends[1])


def test_what_was_made_is_read_again_unless_the_training_differs(model, pool, tmp_path, monkeypatch):
    made = make_first_blocks(model, pool, options(tmp_path))
    calls = []

    def counted(*arguments):
        calls.append(1)
        return follow_flow(*arguments)

    monkeypatch.setattr(first_blocks, "follow_flow", counted)
    again = make_first_blocks(model, pool, options(tmp_path))
    assert torch.equal(made.points, again.points) and torch.equal(made.ends, again.ends) and not calls
    make_first_blocks(model, pool, options(tmp_path, first_blocks=99))
    assert calls == [1]


def test_none_asked_for_is_refused(model, pool, tmp_path):
    with pytest.raises(ValueError, match="first_blocks is 0"):
        make_first_blocks(model, pool, options(tmp_path, first_blocks=0))


def test_a_single_first_block_is_computed_as_in_a_clip(model, pool):
    batch = draw_batch(pool, UNITS, clips=2, few_step=True, generator=torch.Generator().manual_seed(0))
    model.parallel = BlockParallel(model.transformer, UNITS)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        whole = model(batch).unflatten(0, (2, -1))[:, 0]
    row = UNITS.index(FIRST_BLOCK)
    rows = torch.tensor([row, row + len(UNITS)])
    captions = [batch.captions[index] for index in batch.text_index[rows].tolist()]
    model.parallel = BlockParallel(model.transformer, (FIRST_BLOCK,))
    for clip in range(2):
        sigma = float(batch.timesteps[rows[clip]]) / 1000.0
        with torch.no_grad():
            single = guess_velocity(model, captions[clip : clip + 1], batch.samples[rows[clip : clip + 1]], sigma)[0]
        torch.testing.assert_close(single, whole[clip], rtol=0.05, atol=0.05)


def test_all_first_blocks_but_one_are_points_whose_targets_lead_to_the_end(pool):
    generator = torch.Generator().manual_seed(0)
    batch = draw_batch(pool, UNITS, clips=16, few_step=True, generator=generator)
    made = FirstBlocks(torch.randn(CLIPS, 4, 8, 3, 4, 4, generator=generator), torch.randn(CLIPS, 8, 3, 4, 4))
    new = use_first_blocks(batch, made, UNITS, generator)
    sigmas = (new.timesteps / 1000.0).view(16, -1)
    noisy = [index for index, unit in enumerate(UNITS) if unit.noisy]
    firsts = [index for index, unit in enumerate(UNITS) if unit == FIRST_BLOCK][1:]
    assert len(firsts) == FIRST_BLOCK_COPIES - 1
    old_samples, samples = (some.samples.unflatten(0, (16, -1)) for some in (batch, new))
    old_targets, targets = (some.targets.unflatten(0, (16, -1)) for some in (batch, new))
    for index in range(len(UNITS)):
        if index not in firsts:
            assert torch.equal(old_samples[:, index], samples[:, index])
            if index in noisy:
                assert torch.equal(old_targets[:, noisy.index(index)], targets[:, noisy.index(index)])
            continue
        for clip, source in enumerate(new.clips.tolist()):
            sigma = sigmas[clip, index]
            step = int((OWN - sigma).abs().argmin())
            assert torch.isclose(OWN[step], sigma)
            assert torch.equal(samples[clip, index], made.points[source, step])
            led = samples[clip, index] - sigma * targets[clip, noisy.index(index)]
            assert torch.allclose(led, made.ends[source], atol=1e-4)
    assert len({round(float(sigma), 4) for sigma in sigmas[:, firsts].flatten()}) == 4
