"""What a user chose for a stream, and left to the model's preset."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from ..families.kv_policies import KV_PLAIN
from ..families.model_family import check_side
from ..families.step_list import StepList
from ..families.stream_preset import StreamPreset
from ..memory.cleanup import CleanupPolicy
from .known_families import FAMILIES
from .picture_rate import exact_rate
from .settings import StreamSettings

# As long a past as there is, so that no choice is refused for the context that another preset would bring.
_ANY_PRESET = replace(FAMILIES[0].presets[0], context_frames=1000)


@dataclass(frozen=True)
class StreamChoices:
    """Settings of a stream as a user gives them; None leaves one to the preset. See `StreamSettings`.

    Attributes:
        preset: name of one; None for the model's own.
        fps: pictures a second.
    """

    preset: str | None = None
    width: int | None = None
    height: int | None = None
    fps: float | None = None
    steps: int | None = None
    shift: float | None = None
    kv_policy: str | None = None
    context_frames: int | None = None
    sink_frames: int | None = None
    attention_bias: float | None = None
    frames_per_block: int | None = None
    timesteps: StepList | None = None
    first_block_timesteps: StepList | None = None
    blocks: int = 9
    seed: int = 0
    cleanup: CleanupPolicy = CleanupPolicy.WHEN_IT_PAYS
    reset_compile: bool = False
    kv_format: str = KV_PLAIN
    on_prompt_change: str | None = None
    memory_gb: float = 0.0
    embeds_given: bool = False
    start_given: bool = False
    video_given: bool = False
    endless: bool = False

    def check(self, size_step: int) -> None:
        """Raise ValueError for what no preset can make possible, before the model's files are read.

        Args:
            size_step: width and height are multiples of it, whatever the family.
        """
        self.complete(_ANY_PRESET)
        if self.fps is not None:
            exact_rate(self.fps, otherwise=", or 0 for as many as the preset has")
        for name in ("width", "height"):
            check_side(name, getattr(self, name) or size_step, size_step)

    def complete(self, preset: StreamPreset | StreamSettings) -> StreamSettings:
        """The settings, with what the user left open from `preset`, or from the stream that is to go on.

        A chosen number of steps replaces the preset's timesteps; with a smaller context, fewer sink frames stay.

        Raises:
            ValueError: a value, or two together, are not possible.
        """
        # The memory decides the others.
        names = [field.name for field in fields(StreamSettings) if hasattr(self, field.name)]
        chosen = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        values: dict[str, Any] = {name: getattr(preset, name) for name in names if hasattr(preset, name)} | chosen
        if self.timesteps is not None:
            values["steps"] = len(self.timesteps) if self.steps is None else self.steps
        elif self.steps is not None:
            values["timesteps"] = None
        if self.sink_frames is None:
            values["sink_frames"] = min(preset.sink_frames, values["context_frames"])
        return StreamSettings(**values)
