"""One stream: the loop around `pipe()`."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
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
from .block_result import BlockFailedError, StreamBlock, check_finite, take_frames
from .carried_state import DECODER_CACHE, INPUT_ENCODER
from .device_choice import check_attention_backend
from .kept_past import KeptPast
from .live_block import NOT_LIVE, LiveAttempt, LiveBlock
from .looks import PassCallback, looking, watching_passes
from .memory_ladder import MemoryLadder, TellRung, tell_nobody
from .memory_rungs import DECODES, rungs_of
from .prompt_encodings import PromptEncodings
from .settings import StreamSettings
from .shortages import Shortages
from .snapshot import StreamSnapshot
from .state import StreamState
from .stream_pipeline import StreamPipeline

__all__ = ("BlockFailedError", "Session", "StreamBlock")

# The stage behind the pipeline's own, in which the state is that of the next block already.
_PICTURES = "pictures"

# What a hard cut leaves in the state; see `PromptEncodings`.
_BEYOND_A_CUT = ("prompt_embeds", "encoded_prompt", "prompt_tokens_cut")


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
        on_rung: TellRung = tell_nobody,
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
            on_rung: is told of what is done when the device runs out of memory.

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
        self._going_on = going_on
        # `next_block` counts this stream's blocks; those before it are the pipeline's business only.
        self._blocks_before = 0 if going_on is None else going_on.blocks_made - first_block
        self._last_prompt: str | None = None
        self._closed = self._has_begun = False
        self._kept = KeptPast(pipeline, keeps=keeps_latents, begins=DECODER_CACHE not in (start_from or {}))
        self._tell_rung = on_rung
        self._shortages = Shortages(pipeline, MemoryLadder(rungs_of(pipeline.saving, self), self._rung_taken))

    @property
    def state(self) -> StreamState:
        """Of the stream, between two calls of the pipeline."""
        return self._state

    def memory_notices(self) -> list[str]:
        """What was done because the device ran out of memory, a sentence each."""
        return self._shortages.notices()

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
    def run_block(
        self, prompt: str | BlockPrompt, inputs: Mapping[str, Any] | None = None, live: LiveBlock = NOT_LIVE
    ) -> StreamBlock:
        """Make the next block.

        An error raised here holds no local variables of the functions in its traceback, so a kept error keeps nothing
        of the stream allocated.

        Where the device runs out of memory the work is done again, with less and less on the device: see
        `memory_rungs.py`. What is kept for snapshots does not change before the block is made.

        Args:
            prompt: of this block, or several mixed; the text encoder runs only for a prompt that is not known yet.
                With a cut the block begins afresh, as the first one of a new session does.
            inputs: of the pipeline's call, for this block only: `input_pictures` and `strength` make it from a video.
            live: how people take part. A block that they want otherwise is begun again, once, from the state and with
                the noise that it began with, unless what it has changed cannot be undone.

        Raises:
            BlockFailedError: latents or pictures are not finite. The session is over.
            ValueError: the pipeline cannot mix prompts.
            torch.OutOfMemoryError: and nothing more could be done. The session is over.
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
        # Embeddings may be given to a stream whose past had a prompt.
        before = self._state.get("encoded_prompt") if self._going_on is None else self._going_on.prompt
        while not self._try_block(shown, before, live):
            shown, self._inputs, live = live.begin_again()
        values = self._state.values
        check_finite(values, self.next_block, self.pipeline.explain_not_finite)
        frames = self._shortages.survive(self.next_block, _PICTURES, lambda: take_frames(values, self.next_block))
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
        self._kept.block_made(self._state.values, self.settings.frames_per_block)
        return block

    def _try_block(self, shown: BlockPrompt, before: str | None, live: LiveBlock) -> bool:
        """Call the pipeline for the block behind one of the prompt `before`; False where it is wanted otherwise now."""
        survive = partial(self._shortages.survive, self.next_block)
        survive("text_encoder", lambda: self._encode(shown, before), of_text=True)
        survive("past", self._take_up_past)
        # Once per stream, and again after a text encoder evicted the rest: on each call ComfyUI's model management
        # goes through all its models and may empty the cache.
        if not self._has_begun or not self.pipeline.is_resident():
            survive("loading", lambda: self.pipeline.bring_components(self.settings))
            self.recorder.add("bring components")
        self._has_begun = True
        survive("decode again" if self._start_pictures is None else "start pictures", self._make_past, takes=DECODES)
        pipe = self.pipeline.pipe
        passes = watching_passes(getattr(pipe, "transformer", None), self.on_pass)
        attempt = LiveAttempt(live, self._state.values, self.pipeline, self.settings)
        with attempt.watched(), self._looking(), passes, self.recorder.watching(pipe):
            self._state = self._shortages.make(
                lambda: pipe(self._state, **self._call_inputs(shown.name, live)), self, self._generator, self.next_block
            )
        return not attempt.is_given_up

    def note_block(self) -> None:
        """Have `snapshot_of_noted` give the stream as it is now, also while the next block is made or fails."""
        if self._last_prompt is not None:
            carried = self.pipeline.carried_state(self._state.values | {"generator": self._generator}, self.settings)
            scene = self._first_of_scene
            self._kept.note(carried, prompt=self._last_prompt, blocks_made=self._blocks_made, scene_began=scene)

    def snapshot_of_noted(self) -> StreamSnapshot:
        """The stream as it was when it was noted; this session cannot go on if it is in the midst of a block.

        Raises:
            ValueError: it was not noted, or what the next block has changed cannot be undone.
            CannotSnapshotError: the pipeline's state cannot be copied.
            MemoryError: there is too little RAM for the copy.
        """
        noted = self._kept.noted
        return self._snapshot(noted.restored(), noted.prompt, noted.blocks_made, noted.scene_began)

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
        state = self._state.values | {"generator": self._generator} | self._kept.entries(lean=lean)
        return self._snapshot(state, self._last_prompt, self._blocks_made, self._first_of_scene)

    def _snapshot(self, state: Mapping[str, Any], prompt: str, blocks_made: int, scene_began: int) -> StreamSnapshot:
        return StreamSnapshot.take(
            self.pipeline, self.settings, state, blocks_made=blocks_made, prompt=prompt, scene_began=scene_began
        )

    def _take_up_past(self) -> None:
        """Bring the stream to go on from to the device: not before the text encoder may have left."""
        past = self._going_on
        if past is not None:
            unused = () if self.settings.video_given else (INPUT_ENCODER,)
            self._state.values.update(past.start_entries(self.pipeline, without=unused))
            self._generator = self._state.values["generator"]
            self._kept.take_up(self._state.values)
        self._going_on = None

    def _make_past(self) -> None:
        """Make what the first block needs of its past and nobody kept, with the components on the device."""
        with self._looking():
            if self._start_pictures is not None:
                self._state.values.update(self.pipeline.start_from_pictures(self._start_pictures, self.settings))
                self._start_pictures = None
                self._kept.begin_with(self._state.get("current_denoised_latents"))
                self.recorder.add("start pictures")
            made = self._kept.make_decoder(self.settings)
        if made:
            self._state.values.update(made)
            self.recorder.add("decode again")

    def _rung_taken(self, block: int, stage: str, rung: str) -> None:
        if stage != _PICTURES:
            # The keys of before the block, which may be packed now; behind it they are others.
            self._kept.follow_keys(self._state.values)
        self._tell_rung(block, stage, rung)

    def close(self) -> None:
        """Drop all caches and free their memory. Weights stay in the pipeline."""
        if self._closed:
            return
        self._closed = True
        self._kept.drop()
        self._state.clear()
        self.recorder.close()
        self.pipeline.saving.drop_graphs()
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
        self._kept.begin_afresh()

    def _encode(self, prompt: BlockPrompt, before: str | None) -> None:
        worked = self._prompts.put(self._state, prompt)
        has_past = self._blocks_made > self._first_of_scene or bool(self._state.get("stream_position"))
        recomputes = self.settings.on_prompt_change == RECOMPUTE_KEYS and "keys_are_stale" in self._expected_inputs
        # Not at each step of a transition, but behind it.
        if before not in (None, prompt.name) and prompt.coming_from is None and has_past and recomputes:
            self._state.values["keys_are_stale"] = True
        # Most blocks have the previous block's prompt: nothing ran, so nothing is recorded.
        if worked:
            self.recorder.add("text encode", "prompt changed" if self.next_block else "")

    def _call_inputs(self, prompt: str, live: LiveBlock = NOT_LIVE) -> dict[str, Any]:
        inputs = {
            **self.settings.pipeline_inputs(),
            **self._inputs,
            "prompt": [prompt],
            "block_idx": self._blocks_made - self._first_of_scene,
            "generator": self._generator,
            "show_pictures": live.show,
        }
        return {name: value for name, value in inputs.items() if name in self._expected_inputs}

    def _looking(self) -> AbstractContextManager[None]:
        """Look for a cancel while the pipeline's modules compute."""
        return looking(self.pipeline.on_look, self.pipeline.pipe.components.values(), self.pipeline.device)
