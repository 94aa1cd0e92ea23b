"""What a prompt asks of a stream, to be told from another prompt that has a sampler with the same node id."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..stream.going_on import model_of
from .connected_pictures import ConnectedPictures
from .sampler_values import SamplerValues

# What makes another stream. Its length, what is kept of it, and what the memory decides do not.
_COMPARED = (
    "seed", "prompt", "preset", "width", "height", "steps", "shift", "kv_policy", "kv_format", "context_frames",
    "sink_frames", "attention_bias", "fps", "frames_per_block", "timesteps", "first_block_timesteps",
    "on_prompt_change",
)  # fmt: skip
_OF_PICTURES = ("strength", "fit", "video_end")
_CONNECTED = ("start", "video", "track", "live", "conditioning", "go_on_from")
# Longer ones are cut, and a digest of all follows.
_LONGEST = 100


def asked_of(values: SamplerValues, pictures: ConnectedPictures) -> str:
    """What is asked, as JSON text; the same in another run of the program.

    Args:
        values: of the sampler's inputs.
        pictures: that are connected to it.
    """
    asked: dict[str, Any] = {name: _short(value) for name, value in model_of(values.pipeline).items()}
    asked |= {name: _short(getattr(values, name)) for name in _COMPARED}
    sources = {"start": pictures.start_source, "video": pictures.video_source}
    given = {name: _short(source.identity()) for name, source in sources.items() if source is not None}
    if given or values.live is not None:
        asked |= given | {name: getattr(values, name) for name in _OF_PICTURES}
    for name, value in (("track", values.track), ("live", values.live)):
        if value is not None:
            asked[name] = _short(repr(value))
    asked |= {name: True for name in _CONNECTED[-2:] if getattr(values, name) is not None}
    return json.dumps(asked)


def difference(known: str, asked: str) -> str:
    """What differs between two streams that were asked for, for a sentence; "" where nothing does.

    Args:
        known: of `asked_of`, from a file that may hold anything; "" where it does not say.
        asked: of `asked_of`.
    """
    try:
        before, now = json.loads(known or "{}"), json.loads(asked)
        if not before:
            return ""
        known_names = dict.fromkeys((*now, *_OF_PICTURES, *_CONNECTED))
        names = [name for name in known_names if before.get(name) != now.get(name)]
    except (ValueError, TypeError, AttributeError, RecursionError):
        return "what was asked of it cannot be read"
    return "; ".join(f"its {name} is {_shown(before.get(name))}, here {_shown(now.get(name))}" for name in names[:3])


def _short(value: Any) -> Any:  # noqa: ANN401
    if not isinstance(value, str) or len(value) <= _LONGEST:
        return value
    return f"{value[:_LONGEST]}... ({hashlib.sha256(value.encode(errors='surrogatepass')).hexdigest()[:16]})"


def _shown(value: Any) -> str:  # noqa: ANN401
    return "none" if value is None else repr(value)[:_LONGEST]
