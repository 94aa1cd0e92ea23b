"""What a user gave to the Streaming Block Sampler, as values with defaults for workflows that do not have them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..families.kv_policies import KV_AUTO
from ..families.step_list import StepList
from ..memory.cleanup import CleanupPolicy
from ..stream.choices import StreamChoices
from ..stream.foreign_limits import refuse_mixes, refuse_what_blocks_do_not_take
from ..stream.picture_choices import FITS, MIDDLE_STRENGTH, VIDEO_ENDS
from ..stream.prompt_track import PromptTrack, check_size
from ..stream.recipe import BUILT_IN_BLOCKS, Recipe
from .live_input import LiveSource
from .run_inputs import TIMELINE_ON
from .sampler_inputs import FROM_MODEL, SIZE_STEP, UNSET, UNSET_SINK
from .saving_inputs import NEW_STREAM, SAVE_EVERY

if TYPE_CHECKING:
    from ..stream.snapshot import StreamSnapshot


@dataclass(frozen=True)
class SamplerValues:
    """Values of the node's inputs, by their names; see `sampler_inputs` for what each does."""

    pipeline: Recipe
    prompt: str
    seed: int
    blocks: int
    width: int
    height: int
    steps: int
    shift: float
    kv_policy: str
    context_frames: int
    sink_frames: int
    attention_bias: float
    fps: float
    cleanup: str
    keep_frames: str
    memory_timeline: str = TIMELINE_ON
    reset_compile: bool = False
    conditioning: Any = None
    preset: str = FROM_MODEL
    frames_per_block: int = UNSET
    timesteps: str = ""
    first_block_timesteps: str = ""
    memory_gb: float = UNSET
    kv_format: str = KV_AUTO
    on_prompt_change: str = FROM_MODEL
    track: PromptTrack | None = None
    go_on_from: StreamSnapshot | None = None
    same_video: bool = False
    keep_stream: bool = True
    start: Any = None
    video: Any = None
    strength: float = MIDDLE_STRENGTH
    fit: str = FITS[0]
    video_end: str = VIDEO_ENDS[0]
    seconds: float = UNSET
    endless: bool = False
    live: LiveSource | None = None
    save_every: int = SAVE_EVERY
    resume: str = NEW_STREAM

    def check(self) -> StreamChoices:
        """What is chosen for the stream, checked as far as that is possible before the model's files are read.

        Raises:
            ValueError: one sentence that names the input, its value and what is possible.
        """
        self._check_sockets()
        check_size("prompt", self.prompt)
        choices = self._choices()
        choices.check(SIZE_STEP if self.pipeline.blocks == BUILT_IN_BLOCKS else 1)
        if self.track is not None and (self.endless or not self.seconds):
            self.track.check(None if self.endless else self.blocks)
        refuse_what_blocks_do_not_take(
            self.pipeline,
            embeds_given=choices.embeds_given,
            start_given=choices.start_given,
            video_given=choices.video_given,
        )
        if self.track is not None and self.track.is_mixed:
            refuse_mixes(self.pipeline)
        return choices

    @property
    def goes_on(self) -> bool:
        """Whether the stream's first block has a past."""
        cut_off = self.track is not None and self.track.begins_with_a_cut
        return self.start is not None or (self.go_on_from is not None and not cut_off)

    def _check_sockets(self) -> None:
        # A track of values alone leaves the prompt to others.
        prompts = self.track if self.track is not None and self.track.has_prompts else None
        both = [
            ("conditioning", self.conditioning, "track", prompts, "the prompt"),
            ("start", self.start, "go_on_from", self.go_on_from, "the stream's past"),
            ("video", self.video, "live", self.live, "what the blocks are made from"),
        ]
        for one, given, other, other_given, what in both:
            if given is not None and other_given is not None:
                raise ValueError(f"{one} and {other} are both connected, and each is {what}: disconnect one of them.")
        if not 0.0 <= self.seconds < float("inf"):
            raise ValueError(f"seconds is {self.seconds}: give the video's length, or 0 for as many blocks as asked.")

    def _choices(self) -> StreamChoices:
        return StreamChoices(
            width=self.width or None,
            height=self.height or None,
            fps=self.fps or None,
            steps=self.steps or None,
            shift=self.shift or None,
            kv_policy=_or_preset(self.kv_policy),
            context_frames=self.context_frames or None,
            sink_frames=None if self.sink_frames == UNSET_SINK else self.sink_frames,
            attention_bias=self.attention_bias or None,
            frames_per_block=self.frames_per_block or None,
            timesteps=StepList.parse("timesteps", self.timesteps),
            first_block_timesteps=StepList.parse("first_block_timesteps", self.first_block_timesteps),
            blocks=self.blocks,
            seed=self.seed,
            cleanup=CleanupPolicy(self.cleanup),
            reset_compile=self.reset_compile,
            memory_gb=float(self.memory_gb),
            kv_format=self.kv_format,
            on_prompt_change=_or_preset(self.on_prompt_change),
            embeds_given=self.conditioning is not None,
            start_given=self.start is not None,
            video_given=self.video is not None or self.live is not None,
            endless=self.endless,
        )


def _or_preset(chosen: str) -> str | None:
    return None if chosen == FROM_MODEL else chosen
