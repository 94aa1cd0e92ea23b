"""What a repository's own blocks cannot take, said before their weights are read. No torch: nodes ask."""

from __future__ import annotations

from collections.abc import Collection

from .recipe import BUILT_IN_BLOCKS, Recipe


def refuse_what_blocks_do_not_take(recipe: Recipe, *, embeds_given: bool, start_given: bool, video_given: bool) -> None:
    """Raise ValueError, one sentence, for a connected input that only the built-in blocks take.

    Args:
        recipe: of the pipeline, with blocks of either kind.
        embeds_given: whether the prompt comes as embeddings.
        start_given: whether the stream goes on from given pictures.
        video_given: whether each block is made from pictures of a video.
    """
    if recipe.blocks == BUILT_IN_BLOCKS:
        return
    if embeds_given:
        raise ValueError(
            f"a conditioning is connected, and the blocks of {recipe.model} encode the prompt themselves: "
            "disconnect it and write the prompt."
        )
    for name, given in (("start", start_given), ("video", video_given)):
        if given:
            raise ValueError(
                f"{name} is connected, and what the blocks of {recipe.model} make of pictures is not known: "
                "disconnect it, or choose the built-in blocks."
            )


def refuse_mixes(recipe: Recipe) -> None:
    """Raise ValueError, one sentence, for a mix of prompts where a repository's own blocks encode them."""
    if recipe.blocks != BUILT_IN_BLOCKS:
        raise ValueError(
            f"a block mixes several prompts, and the blocks of {recipe.model} encode the prompt themselves: "
            "give each block one prompt, without weights and '->', or choose the built-in blocks."
        )


def refuse_bias(recipe: Recipe, bias: float, taken: Collection[str]) -> None:
    """Raise ValueError, one sentence, for a track's attention bias where a repository's own blocks take none.

    Args:
        recipe: of the pipeline, with blocks of either kind.
        bias: that the track says.
        taken: names of the inputs that the blocks declare.
    """
    if recipe.blocks != BUILT_IN_BLOCKS and "attention_bias" not in taken:
        raise ValueError(
            f"the track says bias {bias}, and the blocks of {recipe.model} take no attention_bias: leave bias out of "
            "the track, or choose the built-in blocks."
        )
