"""Sentences for the user on what a stream could not do as asked."""

from __future__ import annotations

from .session import StreamBlock
from .settings import INPUT_NAMES, StreamSettings
from .stream_pipeline import StreamPipeline

# How long a stream is does not depend on what its blocks take.
_LENGTHS = frozenset({"blocks", "frames_per_block"})


def ignored_settings(pipeline: StreamPipeline, settings: StreamSettings) -> list[str]:
    """Which settings were changed without effect: a repository's own blocks take only declared inputs."""
    taken, defaults = set(pipeline.pipe.blocks.input_names), StreamSettings()
    ignored = [
        f"{name} {getattr(settings, name)}"
        for name, input_name in INPUT_NAMES.items()
        if name not in _LENGTHS and input_name not in taken and getattr(settings, name) != getattr(defaults, name)
    ]
    if not ignored:
        return []
    return [f"The pipeline's blocks take no {', no '.join(ignored)}: these settings have no effect."]


def cut_prompt(block: StreamBlock) -> list[str]:
    """That the end of a block's prompt was cut off."""
    if not block.prompt_tokens_cut:
        return []
    return [f"The prompt is {block.prompt_tokens_cut} tokens too long for the text encoder; its end was cut off."]
