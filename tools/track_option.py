"""The option `--track FILE` of `run.sh`: a prompt track on each sampler of a workflow."""

from __future__ import annotations

from pathlib import Path
from typing import Any

TRACK = "StreamBlocksPromptTrack"
SAMPLER = "StreamBlocksSampler"


def read_track(path: Path) -> str:
    """The text of a track file; raises ValueError, one sentence, where there is none."""
    try:
        # Editors on Windows put a byte order mark before the text.
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"--track is {str(path)!r}, which cannot be read as text: {error}.") from error


def insert_track(prompt: dict[str, dict[str, Any]], text: str) -> None:
    """Put a Stream Prompt Track node before the samplers of an API-format `prompt`.

    Raises:
        ValueError: there is no sampler.
    """
    samplers = [node for node in prompt.values() if node["class_type"] == SAMPLER]
    if not samplers:
        raise ValueError(f"The workflow has no {SAMPLER}, so --track cannot be used.")
    node_id = str(1 + max((int(key) for key in prompt if key.isdecimal()), default=0))
    inputs = {"text": text, "interpolation": "linear"}
    prompt[node_id] = {"inputs": inputs, "class_type": TRACK, "_meta": {"title": "Stream Prompt Track"}}
    for sampler in samplers:
        sampler["inputs"]["track"] = [node_id, 0]
