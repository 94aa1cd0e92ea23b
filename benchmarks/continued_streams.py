"""Is a stream that stops and goes on from a snapshot the one that never stopped, with each KV policy?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import streamblocks_path  # noqa: F401
import torch

from streamblocks.families.kv_policies import KV_FP8, KV_INT8, RECOMPUTE, RECOMPUTE_KEYS, ROLLING
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.snapshot import StreamSnapshot
from streamblocks.stream.stream_pipeline import StreamPipeline
from streamblocks.tools.train_mini.clips import SIZE
from streamblocks.tools.train_mini.scenes import Scene, plain_caption

# The prompt changes at the seam.
_FIRST, _THEN, _OTHER = (plain_caption(Scene(color, "circle", "right")) for color in ("red", "blue", "green"))
_SEED = 2_000_000


CASES = {
    "recompute": StreamSettings(kv_policy=RECOMPUTE),
    "recompute, longer context": StreamSettings(kv_policy=RECOMPUTE, context_frames=6),
    "recompute, FP8": StreamSettings(kv_policy=RECOMPUTE, kv_format=KV_FP8),
    "rolling": StreamSettings(kv_policy=ROLLING),
    "rolling with sink": StreamSettings(kv_policy=ROLLING, context_frames=4, sink_frames=1),
    "rolling, FP8": StreamSettings(kv_policy=ROLLING, kv_format=KV_FP8),
    "rolling, INT8, in fewer passes": StreamSettings(kv_policy=ROLLING, kv_format=KV_INT8, fuse_context=True),
    "rolling, keys computed anew": StreamSettings(kv_policy=ROLLING, on_prompt_change=RECOMPUTE_KEYS),
}


def continue_equal(
    model: str, *, blocks: int = 4, cut: int = 2, cases: Mapping[str, StreamSettings] = CASES
) -> dict[str, bool]:
    """By policy, whether `blocks` blocks in one run are bitwise those of two sessions with a snapshot between them.

    Two sessions go on from each snapshot: the first with another prompt, which must make another video, and then the
    one that is compared.

    Args:
        model: folder of the mini pipeline; it computes in float32.
        blocks: in all.
        cut: of them, before the snapshot.
        cases: settings by the name of the policy.
    """
    pipeline = materialise(Recipe(model, dtype="float32"))
    return {
        name: _is_equal(pipeline, replace(settings, width=SIZE, height=SIZE, seed=_SEED), blocks, cut)
        for name, settings in cases.items()
    }


def _is_equal(pipeline: StreamPipeline, settings: StreamSettings, blocks: int, cut: int) -> bool:
    whole, _ = _stream(pipeline, settings, [_FIRST] * cut + [_THEN] * (blocks - cut))
    before, snapshot = _stream(pipeline, settings, [_FIRST] * cut)
    other, _ = _stream(pipeline, settings, [_OTHER], snapshot)
    after, _ = _stream(pipeline, settings, [_THEN] * (blocks - cut), snapshot)
    return torch.equal(whole, torch.cat([before, after])) and not torch.equal(other, after[: len(other)])


def _stream(
    pipeline: StreamPipeline, settings: StreamSettings, prompts: Sequence[str], past: StreamSnapshot | None = None
) -> tuple[torch.Tensor, StreamSnapshot]:
    """Pictures of a session, uint8 [F, height, width, 3], and the stream after it."""
    with Session(pipeline, settings, going_on=past) as session:
        pictures = torch.cat([session.run_block(prompt).frames for prompt in prompts])
        return pictures, session.snapshot()
