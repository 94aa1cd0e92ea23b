"""Block masks in a cache with a size, and the caches of torch.compile: counted and cleared."""

import pytest
import torch

from streamblocks.memory.compile_caches import clear_compile_caches, count_compile_caches
from streamblocks.memory.owners import MASKS
from streamblocks.memory.recorder import TimelineRecorder
from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.ops.block_masks import BlockCausalShape, BlockMaskCache
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.transformer.installed_attention import block_masks_of

pytestmark = [
    pytest.mark.usefixtures("no_pipeline"),
    pytest.mark.filterwarnings("ignore:flex_attention called without"),
]

CPU = torch.device("cpu")


def shape(queries, past=0, block=3):
    return BlockCausalShape(queries, past, block, CPU)


def test_a_cache_keeps_as_many_masks_as_its_size_and_the_latest():
    cache = BlockMaskCache(size=2)
    first = cache.block_causal(shape(6))
    cache.block_causal(shape(9))
    assert cache.block_causal(shape(6)) is first
    cache.block_causal(shape(12))
    assert sorted(cache.masks()) == ["12 x 12 by 3", "6 x 6 by 3"]
    del first
    live = live_tensor_bytes()
    for past in range(50):
        cache.block_causal(shape(6, past))
    assert len(cache) == 2
    assert live_tensor_bytes() == live
    with pytest.raises(ValueError, match="size is 0"):
        BlockMaskCache(0)


@pytest.mark.parametrize(("queries", "past", "block"), [(6, 0, 3), (7, 4, 3), (200, 30, 70)])
def test_the_mask_is_the_loop_over_blocks(queries, past, block):
    mask = BlockMaskCache().block_causal(shape(queries, past, block))
    query, key = torch.arange(queries)[:, None], torch.arange(past + queries)[None]
    expected = torch.zeros(queries, past + queries, dtype=torch.bool)
    for start in range(0, queries, block):
        expected[start : start + block, : past + min(start + block, queries)] = True
    assert torch.equal(mask.mask_mod(torch.tensor(0), torch.tensor(0), query, key)[:, : past + queries], expected)


def stream(folder, recorder=None, **changes):
    recipe = Recipe(model=str(folder), **changes)
    settings = StreamSettings(width=32, height=32, steps=1, context_frames=6)
    pipeline = materialise(recipe)
    with Session(pipeline, settings, recorder=recorder) as session:
        frames = [session.run_block("a cat").frames for _ in range(5)]
    return torch.cat(frames).int(), block_masks_of(pipeline.pipe.transformer)


def test_flex_makes_the_pictures_of_native_with_one_mask_per_shape(tiny_folder):
    native, none = stream(tiny_folder)
    recorder = TimelineRecorder(CPU)
    flex, masks = stream(tiny_folder, recorder, attention_backend="flex")
    assert (native - flex).abs().max() <= 1
    # Blocks 2, 3 and 4 have the whole context of six frames; block 1 has one block of it, which needs no mask.
    assert none == {} and list(masks) == ["24 x 24 by 12"]
    held = {o.name: o.bytes for o in recorder.timeline().block_ends[-1].owners if o.kind == MASKS}
    assert held == {"24 x 24 by 12": 32}


def test_compile_caches_are_counted_and_cleared(tiny_folder):
    clear_compile_caches()
    assert count_compile_caches().dynamo_entries == 0
    doubled = torch.compile(lambda x: 2 * x, backend="eager")
    doubled(torch.ones(3))
    assert count_compile_caches().dynamo_entries == 1
    assert clear_compile_caches().dynamo_entries == 1
    assert (count_compile_caches().dynamo_entries, count_compile_caches().code_objects) == (0, 0)
    doubled(torch.ones(3))
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    for reset, left in ((False, 1), (True, 0)):
        with Session(pipeline, StreamSettings(width=32, height=32, steps=1, reset_compile=reset)) as session:
            session.run_block("a cat")
            # Never per block.
            assert count_compile_caches().dynamo_entries == 1
        assert count_compile_caches().dynamo_entries == left
