"""What to do about an owner that grows."""

from __future__ import annotations

from collections.abc import Sequence

from .cleanup import STATE_RULES
from .owners import MASKS, MODULE, OTHER_MODELS, PICTURES, STATE, WEIGHTS, Owner
from .pipeline_facts import StateAdvice

RESERVED_ADVICE = (
    "choose cleanup 'every block', or start ComfyUI with --disable-cuda-malloc and the environment variable "
    "PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True, which avoids fragmentation."
)

_BY_KIND = {
    WEIGHTS: (
        "weights are loaded or patched while the stream runs; apply LoRAs before the stream, not between blocks, and "
        "free what is not needed with Free Stream Memory."
    ),
    MODULE: (
        "a module keeps tensors besides its weights; the pipeline's own code puts them there: fix that code, or drop "
        "the pipeline with Free Stream Memory between streams."
    ),
    MASKS: "the stream uses attention masks of more shapes than are cached; make it at one size.",
    PICTURES: "choose keep_frames 'last block' or 'none': the mp4 has all pictures.",
    OTHER_MODELS: "ComfyUI loaded another model meanwhile; run one workflow at a time, or unload that model.",
}
_REST_ADVICE = (
    "neither the pipeline nor its state holds it; look for another node or pack that runs during the stream, and for "
    "code that keeps what the pipeline returned."
)


def advise(owner: Owner, state_advice: Sequence[StateAdvice]) -> str:
    """What to do about `owner`, which grows: the end of a sentence.

    Args:
        owner: the one that grows.
        state_advice: the pipeline's own, for keys of its state.
    """
    if owner.kind != STATE:
        return _BY_KIND.get(owner.kind, _REST_ADVICE)
    for known in state_advice:
        if known.key == owner.name:
            return known.advice
    if owner.name in {rule.key for rule in STATE_RULES}:
        return "the pipeline's blocks add to this key in every call; if only the first block resets it, fix the blocks."
    return (
        f"if the next block does not need it, write '{owner.name} = drop' into state_rules of Load Streaming Pipeline; "
        "else the pipeline's blocks have to be fixed."
    )
