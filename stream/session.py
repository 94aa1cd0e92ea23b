"""One stream: the loop around `pipe()`."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch

from ..families.kv_policies import RECOMPUTE_KEYS
from ..memory.cleanup import clean_up_after_block, handling_table, release_cached_memory
from ..memory.compile_caches import clear_compile_caches
from ..memory.error_locals import clearing_error_locals
from ..memory.owners import MASKS
from ..memory.recorder import CLEAN_UP, NoRecording
from .block_prompt import BlockPrompt
from .carried_state import DECODED_LATENTS, DECODER_CACHE, INPUT_ENCODER
from .decoded_latents import DecodedLatents
from .device_choice import check_attention_backend
from .frames import to_uint8_frames
from .last_block import LastBlock
from .looks import PassCallback, looking, watching_passes
from .prompt_encodings import PromptEncodings
from .settings import StreamSettings
from .snapshot import StreamSnapshot
from .state import StreamState
from .stream_pipeline import StreamPipeline

logger = logging.getLogger(__name__)

# What a hard cut leaves in the state; see `PromptEncodings`.
_BEYOND_A_CUT = ("prompt_embeds", "encoded_prompt", "prompt_tokens_cut")


class BlockFailedError(RuntimeError):
    """A block is unusable; the blocks before it are good."""

    # Programs that show errors to users put the module before the name, unless it is this one.
    __module__ = "builtins"


@dataclass(frozen=True)
class StreamBlock:
    """One block of the stream.

    Attributes:
        index: 0 for the first.
        prompt: of the block; of a mix `BlockPrompt.name`.
        frames: uint8 [F, height, width, 3] on the CPU.
        seconds: wall time of the whole call.
        prompt_tokens_cut: how many tokens of the prompt the text encoder cut off.
    """

    index: int
    prompt: str
    frames: torch.Tensor
    seconds: float
    prompt_tokens_cut: int


class Session:
    """A running stream. Use as a context manager, or call `close`.

    Example:
        >>> with Session(pipeline, StreamSettings(width=832, height=480)) as session:
        ...     for _ in range(9):
        ...         sink.write(session.run_block("a cat on a surfboard").frames)
    """

    def __init__(
        self,
        pipeline: StreamPipeline,
        settings: StreamSettings,
        on_pass: PassCallback | None = None,
        recorder: NoRecording | None = None,
        start_from: Mapping[str, Any] | None = None,
        start_pictures: torch.Tensor | None = None,
        prompts_ahead: Sequence[str] = (),
        going_on: StreamSnapshot | None = None,
        *,
        first_block: int = 0,
        keeps_latents: bool = False,
    ) -> None:
        """Start a stream; nothing is allocated on the device before the first block.

        Args:
            pipeline: materialised from a recipe.
            settings: of this stream.
            on_pass: called with 0, 1, ... before each pass of the transformer within a block; raise in it to
                stop the stream within one denoising step.
            recorder: of the memory timeline; None records nothing and installs no hook.
            start_from: state entries of a stream to continue, under the names of `STATE_RULES`; the session takes
                ownership and writes to them. The built-in pipeline needs `stream_position` and, under `recompute`,
                `current_denoised_latents` (once the window slides, `frame_cache_context` too), under `rolling`
                `kv_cache`, which takes a block along whose keys are deferred; `decoder_cache` and `generator` make the
                seam invisible. None starts at the first frame.
            start_pictures: uint8 [F, height, width, 3], oldest first, that the stream goes on from; see
                `StreamPipeline.start_from_pictures`. They are encoded before the first block.
            prompts_ahead: prompts that blocks will have; the text encoder runs for all of them before the first block.
            going_on: the stream to continue, as a snapshot, which stays as it is; `check_recipe` and
                `settings_to_go_on` say whether it can be. Its entries come to the device when the first prompt is
                encoded, and replace those of `start_from`.
            first_block: index of the first block, where `going_on` is of the very stream, which counts on.
            keeps_latents: whether copies of the latents decoded last are kept on the CPU, so that snapshots can be
                without the decoder's cache.

        Raises:
            ValueError: the pipeline's attention backend does not support the settings.
        """
        pipeline.check_settings(settings)
        check_attention_backend(pipeline.recipe.attention_backend, pipeline.device, settings.attention_bias)
        self.pipeline = pipeline
        self.settings = settings
        self.on_pass = on_pass
        self.recorder = recorder or NoRecording()
        self.recorder.hold(MASKS, pipeline.held_masks)
        self.next_block = first_block
        # Blocks before the last hard cut, over all sessions.
        self._first_of_scene = 0 if going_on is None else going_on.scene_began
        self._prompts = PromptEncodings(pipeline, prompts_ahead, settings.frames_per_block)
        self._state = self._new_state(start_from or {})
        self._generator = self._state.get("generator") or pipeline.make_generator(settings.seed)
        self._expected_inputs = frozenset(pipeline.pipe.blocks.input_names)
        self._start_pictures = start_pictures
        self._inputs: Mapping[str, Any] = {}
        self._closed = False
        self._going_on = going_on
        # `next_block` counts this stream's blocks; those before it are the pipeline's business only.
        self._blocks_before = 0 if going_on is None else going_on.blocks_made - first_block
        self._last_prompt: str | None = None
        self._has_begun = False
        self._decoded = DecodedLatents() if keeps_latents else None
        if self._decoded is not None and start_from and DECODER_CACHE in start_from:
            self._decoded.begin_with(None)
        self._to_decode_again: torch.Tensor | None = None
        self._noted: LastBlock | None = None

    @property
    def has_made_blocks(self) -> bool:
        """Whether this session has made a block, and none that failed since."""
        return self._last_prompt is not None

    @property
    def _blocks_made(self) -> int:
        """Since the stream's first frame, over all sessions."""
        return self._blocks_before + self.next_block

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @clearing_error_locals
    def run_block(self, prompt: str | BlockPrompt, inputs: Mapping[str, Any] | None = None) -> StreamBlock:
        """Make the next block.

        An error raised here holds no local variables of the functions in its traceback, so a kept error keeps nothing
        of the stream allocated.

        Args:
            prompt: of this block, or several mixed; the text encoder runs only for a prompt that is not known yet.
                With a cut the block begins afresh, as the first one of a new session does.
            inputs: of the pipeline's call, for this block only: `input_pictures` and `strength` make it from a video.

        Raises:
            BlockFailedError: latents or pictures are not finite. The session is over.
            ValueError: the pipeline cannot mix prompts.
        """
        if self._closed:
            raise ValueError("the session is closed: start a new one.")
        began = time.perf_counter()
        shown = BlockPrompt.of(prompt)
        if shown.cut and (self.next_block or self._going_on is not None):
            self._begin_afresh()
        self._state.strip()
        self.recorder.begin_block(self.next_block, self.pipeline.pipe, self._state.values)
        self._inputs = inputs or {}
        self._last_prompt = None
        self._encode(shown)
        self._take_up_past()
        # Once per stream, and again after a text encoder evicted the rest: on each call ComfyUI's model management
        # goes through all its models and may empty the cache.
        if not self._has_begun or not self.pipeline.is_resident():
            self.pipeline.bring_components(self.settings)
            self.recorder.add("bring components")
        self._has_begun = True
        self._make_past()
        passes = watching_passes(getattr(self.pipeline.pipe, "transformer", None), self.on_pass)
        with self._looking(), passes, self.recorder.watching(self.pipeline.pipe):
            self._state = self._call_pipeline(shown.name)
        self._check_finite()
        frames = self._take_frames()
        if clean_up_after_block(self.settings.cleanup, self.pipeline.device):
            self.recorder.add(CLEAN_UP, "cache emptied")
        self.recorder.end_block(self._state.values, frames)
        block = StreamBlock(
            index=self.next_block,
            prompt=shown.name,
            frames=frames,
            seconds=time.perf_counter() - began,
            prompt_tokens_cut=self._state.get("prompt_tokens_cut", 0),
        )
        self.next_block += 1
        self._last_prompt = shown.name
        self._keep_latents()
        return block

    def note_block(self) -> None:
        """Have `snapshot_of_noted` give the stream as it is now, also while the next block is made or fails."""
        if self._decoded is None or self._last_prompt is None:
            return
        self._noted = LastBlock.note(
            self.pipeline.carried_state(self._state.values | {"generator": self._generator}, self.settings),
            self._decoded.joined(),
            prompt=self._last_prompt,
            blocks_made=self._blocks_made,
            scene_began=self._first_of_scene,
        )

    def snapshot_of_noted(self) -> StreamSnapshot:
        """The stream as it was when it was noted; this session cannot go on if it is in the midst of a block.

        Raises:
            ValueError: it was not noted, or what the next block has changed cannot be undone.
            CannotSnapshotError: the pipeline's state cannot be copied.
            MemoryError: there is too little RAM for the copy.
        """
        noted = self._noted
        if noted is None or self._closed:
            raise ValueError("no block of the stream was noted")
        return StreamSnapshot.take(
            self.pipeline,
            self.settings,
            noted.restored(),
            blocks_made=noted.blocks_made,
            prompt=noted.prompt,
            scene_began=noted.scene_began,
        )

    def snapshot(self, *, lean: bool = False) -> StreamSnapshot:
        """The stream after its last block, for sessions that go on from there; costs one copy to the CPU.

        May be taken after any block; this session goes on, too.

        Args:
            lean: take the latents decoded last in the place of the decoder's cache, where they are kept.

        Raises:
            ValueError: there is no block yet, the last one failed, or the session is closed.
            CannotSnapshotError: the pipeline's state cannot be copied.
            MemoryError: there is too little RAM for the copy.
        """
        if self._closed or self._last_prompt is None:
            why = "the session is closed" if self._closed else "its last block is not complete"
            raise ValueError(f"a stream can be kept only after a block that was made, and {why}: start a new one.")
        state = self._state.values | {"generator": self._generator}
        decoded = None if self._decoded is None else self._decoded.joined()
        if decoded is not None:
            state |= {DECODED_LATENTS: decoded} | ({DECODER_CACHE: None} if lean else {})
        return StreamSnapshot.take(
            self.pipeline,
            self.settings,
            state,
            blocks_made=self._blocks_made,
            prompt=self._last_prompt,
            scene_began=self._first_of_scene,
        )

    def _take_up_past(self) -> None:
        """Bring the stream to go on from to the device: not before the text encoder may have left."""
        past, self._going_on = self._going_on, None
        if past is not None:
            unused = () if self.settings.video_given else (INPUT_ENCODER,)
            self._state.values.update(past.start_entries(self.pipeline, without=unused))
            self._generator = self._state.values["generator"]
            decoded = self._state.values.pop(DECODED_LATENTS, None)
            if DECODER_CACHE not in self._state.values:
                self._to_decode_again = decoded
            if self._decoded is not None:
                self._decoded.begin_with(decoded)

    def _make_past(self) -> None:
        """Make what the first block needs of its past and nobody kept, with the components on the device."""
        if self._start_pictures is not None:
            with self._looking():
                self._state.values.update(self.pipeline.start_from_pictures(self._start_pictures, self.settings))
            self._start_pictures = None
            self.recorder.add("start pictures")
            if self._decoded is not None:
                self._decoded.begin_with(self._state.get("current_denoised_latents"))
        if self._to_decode_again is not None:
            with self._looking():
                self._state.values.update(self.pipeline.decode_again(self._to_decode_again, self.settings))
            self._to_decode_again = None
            self.recorder.add("decode again")

    def _keep_latents(self) -> None:
        reach = None if self._decoded is None else self.pipeline.decoder_reach()
        latents = self._state.get("current_denoised_latents")
        if self._decoded is None:
            return
        if reach is None or not isinstance(latents, torch.Tensor):
            # Blocks of a repository: what they decode is unknown.
            self._decoded = None
        else:
            self._decoded.add(latents[:, :, -self.settings.frames_per_block :], reach)

    def _call_pipeline(self, prompt: str) -> StreamState:
        """Call the pipeline; when the device runs out of memory, stream more layers and call it again."""
        while True:
            rewind = self._state.remember()
            noise = self._generator.get_state()
            try:
                return self._call_once(prompt)
            except torch.OutOfMemoryError as error:
                if not rewind() or not self.pipeline.stream_more_layers():
                    raise
                logger.warning("block %d is made again with more layers streamed: %s", self.next_block + 1, error)
            self._generator.set_state(noise)
            release_cached_memory(self.pipeline.device)

    @clearing_error_locals
    def _call_once(self, prompt: str) -> StreamState:
        made: StreamState = self.pipeline.pipe(self._state, **self._call_inputs(prompt))
        return made

    def close(self) -> None:
        """Drop all caches and free their memory. Weights stay in the pipeline."""
        if self._closed:
            return
        self._closed = True
        self._state.clear()
        self.recorder.close()
        if self.settings.reset_compile:
            clear_compile_caches()
        release_cached_memory(self.pipeline.device)

    def _new_state(self, values: Mapping[str, Any]) -> StreamState:
        state = StreamState(handling=handling_table(self.pipeline.recipe.state_rules))
        state.values.update(self.pipeline.start(self.settings))
        state.values.update(values)
        return state

    def _begin_afresh(self) -> None:
        """Drop the past, as a hard cut does: the next block finds what the first one of a new session would."""
        past, self._going_on = self._going_on, None
        if past is not None:
            self._generator = past.start_entries(self.pipeline, only=("generator",))["generator"]
        kept = {name: self._state.values[name] for name in _BEYOND_A_CUT if name in self._state.values}
        self._state.clear()
        self._state = self._new_state(kept)
        self._first_of_scene = self._blocks_made
        self._decoded = None if self._decoded is None else DecodedLatents()
        self._noted = None

    def _encode(self, prompt: BlockPrompt) -> None:
        # Embeddings may be given to a stream whose past had a prompt.
        before = self._state.get("encoded_prompt") if self._going_on is None else self._going_on.prompt
        worked = self._prompts.put(self._state, prompt)
        # Not at each step of a transition, but behind it.
        if before not in (None, prompt.name) and prompt.coming_from is None:
            self._mark_keys()
        # Most blocks have the previous block's prompt: nothing ran, so nothing is recorded.
        if worked:
            self.recorder.add("text encode", "prompt changed" if self.next_block else "")

    def _mark_keys(self) -> None:
        """Have the pipeline compute the keys of the past anew with the new prompt, where the settings say so."""
        has_past = self._blocks_made > self._first_of_scene or bool(self._state.get("stream_position"))
        if self.settings.on_prompt_change == RECOMPUTE_KEYS and has_past and "keys_are_stale" in self._expected_inputs:
            self._state.values["keys_are_stale"] = True

    def _call_inputs(self, prompt: str) -> dict[str, Any]:
        inputs = {
            **self.settings.pipeline_inputs(),
            **self._inputs,
            "prompt": [prompt],
            "block_idx": self._blocks_made - self._first_of_scene,
            "generator": self._generator,
        }
        return {name: value for name, value in inputs.items() if name in self._expected_inputs}

    def _looking(self) -> AbstractContextManager[None]:
        """Look for a cancel while the pipeline's modules compute."""
        return looking(self.pipeline.on_look, self.pipeline.pipe.components.values(), self.pipeline.device)

    def _check_finite(self) -> None:
        latents = self._state.get("current_denoised_latents")
        pictures_finite = self._state.get("pictures_finite")
        if isinstance(latents, torch.Tensor) and not torch.isfinite(latents).all():
            what = "latents"
        elif pictures_finite is not None and not pictures_finite:
            what = "pictures"
        else:
            return
        why = self.pipeline.explain_not_finite() or "try dtype bfloat16 or float32, or another attention backend"
        raise BlockFailedError(
            f"block {self.next_block + 1} has NaN or infinite {what}: the {self.next_block} blocks before it are kept; "
            f"{why}."
        )

    def _take_frames(self) -> torch.Tensor:
        videos = self._state.values.pop("videos", None)
        if videos is None:
            raise BlockFailedError(
                f"block {self.next_block + 1} returned no 'videos': the pipeline's blocks do not follow the contract "
                "of a streaming pipeline."
            )
        try:
            return to_uint8_frames(videos)
        except ValueError as error:
            raise BlockFailedError(f"block {self.next_block + 1}: {error}") from error
