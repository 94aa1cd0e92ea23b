"""What the mini model is trained on is what the pipeline computes, weight for weight."""

import copy

import pytest
import torch

from streamblocks.tools.train_mini.batches import draw_batch, gather_units
from streamblocks.tools.train_mini.block_parallel import FIRST_BLOCK_COPIES
from streamblocks.tools.train_mini.clips import draw_plan
from streamblocks.tools.train_mini.latent_pool import BLOCKS, CUTS, LatentPool
from streamblocks.tools.train_mini.mini_models import TEXT_LENGTH
from streamblocks.tools.train_mini.train_transformer import CaptionedTransformer
from streamblocks.wan.steps.text_step import get_t5_prompt_embeds
from streamblocks.wan.transformer.attention_passes import CausalPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
)
from streamblocks.wan.transformer.installed_attention import install_causal_attention

CLIPS = 2


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return CaptionedTransformer().eval().requires_grad_(False)


@pytest.fixture(scope="module")
def batch(model):
    generator = torch.Generator().manual_seed(1)
    plans = [draw_plan(generator, cuts=CUTS, change_share=1.0) for _ in range(3)]
    latents = torch.randn(3, 8, 3 * BLOCKS, 4, 4, generator=generator)
    pool = LatentPool(latents, torch.randn(3, 2, 8, 4, 4, generator=generator), plans, [0.0] * 8, [1.0] * 8)
    return draw_batch(pool, model.parallel.units, clips=CLIPS, few_step=False, generator=generator)


class PipelinePasses:
    """The pipeline's own cached passes over the rows of one clip of a batch."""

    def __init__(self, model, batch, clip):
        self.transformer = copy.deepcopy(model.transformer)
        install_causal_attention(self.transformer)
        self.model, self.batch = model, batch
        self.first_row = clip * len(model.parallel.units)
        self.units = model.parallel.units
        self.text = allocate_cross_cache(self.transformer, text_tokens=TEXT_LENGTH)

    def new_cache(self):
        return allocate_kv_cache(self.transformer, frames=6, latent_height=4, latent_width=4)

    def run(self, unit, cache, again=0):
        row = self.first_row + self.units.index(unit) + again
        caption = self.batch.captions[self.batch.text_index[row]]
        model = self.model
        embeds = get_t5_prompt_embeds(model.text_encoder, model.tokenizer, caption, TEXT_LENGTH, torch.device("cpu"))
        fill_cross_cache(self.transformer, self.text, embeds, caption)
        causal_pass = CausalPass(cache, self.text, frame_offset=unit.offset)
        time = float(self.batch.timesteps[row])
        return predict_velocity(self.transformer, self.batch.samples[row : row + 1], time, causal_pass)[0]


@pytest.mark.parametrize("clip", range(CLIPS))
def test_training_sees_what_rolling_computes(model, batch, clip):
    trained = model(batch).unflatten(0, (CLIPS, -1))[clip]
    units = model.parallel.units
    noisy = [unit for unit in units if unit.noisy]
    passes = PipelinePasses(model, batch, clip)
    cache = passes.new_cache()
    tokens = 3 * cache.tokens_per_frame
    for block in range(BLOCKS):
        cache.begin_block(tokens)
        unit = next(unit for unit in noisy if unit.block == block and unit.offset == 3 * block)
        for again in range(FIRST_BLOCK_COPIES if block == 0 else 1):
            place = noisy.index(unit) + again
            torch.testing.assert_close(trained[place], passes.run(unit, cache, again), rtol=1e-4, atol=1e-4)
        if block < BLOCKS - 1:
            clean = next(u for u in units if not u.noisy and u.block == block and u.text_of == block)
            passes.run(clean, cache)
            cache.commit(tokens)


@pytest.mark.parametrize("clip", range(CLIPS))
def test_training_sees_what_recompute_computes(model, batch, clip):
    trained = model(batch).unflatten(0, (CLIPS, -1))[clip]
    units = model.parallel.units
    noisy = [unit for unit in units if unit.noisy]
    passes = PipelinePasses(model, batch, clip)
    for block in range(1, BLOCKS):
        unit = noisy[-(BLOCKS - block)]
        assert (unit.block, unit.offset) == (block, 3)
        context = units[unit.predecessor]
        assert (context.block, context.text_of, context.offset, context.reencoded) == (block - 1, block, 0, block > 1)
        cache = passes.new_cache()
        passes.run(context, cache)
        cache.commit(3 * cache.tokens_per_frame)
        torch.testing.assert_close(trained[noisy.index(unit)], passes.run(unit, cache), rtol=1e-4, atol=1e-4)


def test_units_hold_the_clips_latents(model):
    latents = torch.arange(3 * BLOCKS, dtype=torch.float32).view(1, 1, -1, 1, 1)
    firsts = torch.tensor([100.0, 200.0]).view(1, 2, 1, 1, 1)
    units = model.parallel.units
    rows = gather_units(LatentPool(latents, firsts, [], [0.0], [1.0]), units, torch.tensor([0])).flatten(2)[0].tolist()
    contexts = {unit.text_of: row for unit, row in zip(units, rows, strict=True) if not unit.noisy and unit.reencoded}
    assert contexts == {2: [100.0, 4.0, 5.0], 3: [200.0, 7.0, 8.0]}
    assert [row for unit, row in zip(units, rows, strict=True) if unit.noisy and unit.block == 3] == [
        [9.0, 10.0, 11.0]
    ] * 2
