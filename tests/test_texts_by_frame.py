"""A text for each latent frame of a block, as in a transition."""

import pytest
import torch
from torch.nn import functional as F

from streamblocks.ops.few_key_attention import attend_by_frame, merge_padding
from streamblocks.wan.transformer.causal_transformer import allocate_cross_cache, fill_cross_cache

from golden_wan import relative_error
from small_wan import make_components, make_pipeline, make_prompts, make_state, run_steps

WORDS, TOKENS, FRAMES = 4, 16, 3


@pytest.fixture(scope="module")
def components():
    return make_components()


def padded(embeds, words=WORDS):
    return torch.cat([embeds[:, :words], torch.zeros_like(embeds[:, words:])], dim=1)


def test_each_frame_reads_its_own_text():
    """As full attention over every text with all of its padding; frames before the block read the first text."""
    generator = torch.Generator().manual_seed(0)
    query = torch.randn((1, 5 * 6, 2, 8), generator=generator)
    padding = torch.randn((2, 1, 1, 2, 8), generator=generator)
    key, value = (
        torch.cat(
            [torch.randn((FRAMES, WORDS, 2, 8), generator=generator), pad.expand(FRAMES, TOKENS - WORDS, 2, 8)], 1
        )
        for pad in padding
    )
    few = merge_padding(WORDS, TOKENS)
    assert few is not None
    made = attend_by_frame(query, key[:, :5], value[:, :5], few, frame_tokens=6)
    for frame, text in enumerate((0, 0, 0, 1, 2)):
        parts = (query[:, frame * 6 : frame * 6 + 6], key[text : text + 1], value[text : text + 1])
        rows, seen, said = (part.transpose(1, 2) for part in parts)
        expected = F.scaled_dot_product_attention(rows, seen, said).transpose(1, 2)
        torch.testing.assert_close(made[:, frame * 6 : frame * 6 + 6], expected)


def run(components, embeds, blocks=3, **options):
    """Latents of a stream whose last block but one has `embeds`."""
    backend = options.pop("backend", None)
    pipe = make_pipeline(components, backend=backend)
    plain = padded(make_prompts()[0])
    state = make_state(prompt_embeds=plain, **options)
    made = []
    for index in range(blocks):
        turned = index == blocks - 2
        state.values |= {"prompt_embeds": embeds if turned else plain, "encoded_prompt": f"prompt {turned}"}
        run_steps(pipe, state)
        made.append(state.get("current_denoised_latents")[:, :, -FRAMES:])
    return torch.cat(made, dim=2)


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
def test_the_same_text_for_each_frame_is_one_text(components, policy):
    other = padded(make_prompts()[1])
    one, three = (run(components, other.repeat(texts, 1, 1), kv_policy=policy) for texts in (1, FRAMES))
    assert relative_error(three, one) <= 1e-5
    ahead = torch.cat([padded(make_prompts()[0]), other, other])
    assert relative_error(run(components, ahead, kv_policy=policy), one) > 1e-4


def test_texts_by_frame_are_the_same_compiled_and_with_a_fused_context(components):
    texts = torch.cat([padded(make_prompts()[0]), padded(make_prompts()[1]), -padded(make_prompts()[1])])
    made = run(components, texts)
    assert relative_error(run(components, texts, fuse_context=True), made) <= 1e-5
    assert relative_error(run(components, texts, backend="eager"), made) <= 1e-5


def test_texts_too_long_for_the_room_of_one_become_the_last(components):
    transformer = make_pipeline(components).transformer
    texts = torch.cat([padded(make_prompts()[0], 2), padded(make_prompts()[0], 5), padded(make_prompts()[1], 3)])
    many, last = (allocate_cross_cache(transformer, text_tokens=TOKENS) for _ in range(2))
    fill_cross_cache(transformer, many, texts, "many")
    fill_cross_cache(transformer, last, texts[-1:], "last")
    assert many.texts == 1 and many.few is not None and int(many.few.used) == 4
    assert torch.equal(torch.stack(many.keys), torch.stack(last.keys))
    fill_cross_cache(transformer, many, padded(texts, 4), "many")
    assert many.texts == FRAMES and many.by_text(many.keys[0]).shape[:2] == (FRAMES, 5)
