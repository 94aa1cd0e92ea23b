"""What a user chooses for one stream."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

from ..families.kv_policies import (
    KEEP_KEYS,
    KV_IN_8_BITS,
    KV_PLAIN,
    RECOMPUTE,
    check_kv_format,
    check_kv_policy,
    check_prompt_change,
)
from ..families.step_list import StepList
from ..memory.cleanup import CleanupPolicy
from .known_families import FAMILIES
from .noise_generator import check_seed

# A recipe's own preset is known once its files are read; these are what a stream starts from until then.
_DEFAULTS = FAMILIES[0].presets[0]

# Settings that the pipeline's blocks take, each with the name of their input.
INPUT_NAMES: Mapping[str, str] = MappingProxyType(
    {
        "blocks": "num_blocks",
        "frames_per_block": "num_frames_per_block",
        "width": "width",
        "height": "height",
        "steps": "num_inference_steps",
        "shift": "shift",
        "kv_policy": "kv_policy",
        "kv_format": "kv_format",
        "fuse_context": "fuse_context",
        "decode_bands": "decode_bands",
        "decoder_cache_in_ram": "decoder_cache_in_ram",
        "context_frames": "context_frames",
        "sink_frames": "sink_frames",
        "attention_bias": "attention_bias",
        "timesteps": "timesteps",
        "first_block_timesteps": "first_block_timesteps",
    }
)


@dataclass(frozen=True)
class StreamSettings:
    """Settings of a stream; checked when made.

    Attributes:
        width: pixels; the model's family defines the allowed sizes.
        height: pixels.
        blocks: how many blocks the stream is planned for; the session itself has no end.
        endless: whether it goes on behind them, until somebody ends it.
        seed: of the stream's one noise generator.
        steps: denoising passes per block, spaced evenly; as many as `timesteps` has, where it is given.
        shift: flow shift of the schedule.
        kv_policy: "recompute" or "rolling".
        fuse_context: whether a block's first step takes the context's pass ("recompute") or the clean pass of the block
            before ("rolling") along, where it can: fewer passes over the weights, the same pictures but for rounding.
            Chosen where weights are streamed.
        decode_bands: of rows that large pictures are decoded in, the same pictures but for rounding; more than 1 where
            whole ones do not fit.
        decoder_cache_in_ram: whether what the decoder keeps of past frames lies in RAM; chosen where bands are not
            enough.
        kv_format: how keys and values of the past are stored, one of `KV_FORMATS`; "auto" is decided by the memory.
        context_frames: latent frames of the past that a block attends to.
        sink_frames: of these, how many stay the stream's first ones ("rolling" only).
        attention_bias: weight on keys of past frames other than the first; 1 is off.
        frames_per_block: latent frames per block.
        timesteps: of the denoising passes of a block; None spaces `steps` evenly.
        first_block_timesteps: of a block without a past; None takes those of every block.
        on_prompt_change: what a new prompt does to the keys of the past under "rolling", one of `PROMPT_CHANGES`.
            "recompute" keeps none: it computes those of its context with the block's own prompt, always.
        cleanup: when cached memory is returned to the card.
        reset_compile: whether torch.compile's caches are cleared when the stream is over.
        memory_gb: GB (10^9 bytes) of the device that the stream may take; 0 for what is free.
        embeds_given: whether the prompt comes as embeddings, so that no text encoder is needed.
        start_given: whether the stream goes on from given pictures.
        video_given: whether each block is made from pictures of a video, which are encoded.
    """

    width: int = _DEFAULTS.width
    height: int = _DEFAULTS.height
    blocks: int = 9
    seed: int = 0
    steps: int = _DEFAULTS.steps
    shift: float = _DEFAULTS.shift
    kv_policy: str = _DEFAULTS.kv_policy
    context_frames: int = _DEFAULTS.context_frames
    sink_frames: int = 0
    attention_bias: float = 1.0
    frames_per_block: int = _DEFAULTS.frames_per_block
    timesteps: StepList | None = None
    first_block_timesteps: StepList | None = None
    kv_format: str = KV_PLAIN
    decode_bands: int = 1
    decoder_cache_in_ram: bool = False
    fuse_context: bool = False
    on_prompt_change: str = KEEP_KEYS
    cleanup: CleanupPolicy = CleanupPolicy.WHEN_IT_PAYS
    reset_compile: bool = False
    memory_gb: float = 0.0
    embeds_given: bool = False
    start_given: bool = False
    video_given: bool = False
    endless: bool = False

    def __post_init__(self) -> None:
        """Check every value.

        Raises:
            ValueError: one sentence that names the setting, its value and what is allowed.
        """
        for name in ("width", "height", "blocks", "steps", "context_frames", "frames_per_block", "decode_bands"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: choose 1 or more.")
        check_seed(self.seed)
        if self.timesteps is not None and len(self.timesteps) != self.steps:
            raise ValueError(
                f"steps is {self.steps} and timesteps are {self.timesteps}: give as many steps as the list has, or no "
                "list."
            )
        if self.memory_gb < 0:
            raise ValueError(f"memory_gb is {self.memory_gb}: give GB that the stream may take, or 0 for what is free.")
        if self.shift <= 0:
            raise ValueError(f"shift is {self.shift}: choose a value above 0 (5 is common).")
        check_kv_policy(self.kv_policy)
        check_kv_format(self.kv_format)
        check_prompt_change(self.on_prompt_change)
        if not 0.0 < self.attention_bias <= 1.0:
            raise ValueError(f"attention_bias is {self.attention_bias}: choose above 0 and up to 1 (1 is off).")
        if not 0 <= self.sink_frames <= self.context_frames:
            raise ValueError(
                f"sink_frames is {self.sink_frames}: choose 0 to {self.context_frames}, the context frames."
            )

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain values, for text output."""
        lists = {name: getattr(self, name) for name in ("timesteps", "first_block_timesteps")}
        written = {name: None if listed is None else str(listed) for name, listed in lists.items()}
        return asdict(self) | written | {"cleanup": self.cleanup.value}

    @property
    def planned_blocks(self) -> int | None:
        """How many blocks the stream has; None for one without end."""
        return None if self.endless else self.blocks

    @property
    def passes(self) -> int:
        """Denoising passes of the whole stream."""
        return self.passes_before(self.blocks)

    @property
    def passes_per_block(self) -> int:
        """Passes over the transformer's weights in a block with a whole context, whose own pass is among them."""
        fused = self.fuse_context and (self.kv_policy != RECOMPUTE or self.context_frames == self.frames_per_block)
        return self.steps if fused else self.steps + 1

    @property
    def savings(self) -> tuple[str, ...]:
        """What was chosen because weights are streamed, as clauses."""
        packed, fused = self.kv_format in KV_IN_8_BITS, self.fuse_context
        return ("keys of the past in 8 bits",) * packed + ("the context's pass fused with the first step",) * fused

    def passes_before(self, block: int) -> int:
        """Denoising passes of the blocks before `block`."""
        first = self.steps if self.first_block_timesteps is None else len(self.first_block_timesteps)
        return 0 if block == 0 else first + (block - 1) * self.steps

    def pipeline_inputs(self) -> dict[str, Any]:
        """Inputs of the pipeline call that are the same for every block of a stream.

        Without the prompt, `block_idx` and the generator. A pipeline may take only some of them.
        """
        return {input_name: getattr(self, name) for name, input_name in INPUT_NAMES.items()}
