"""One stream: the loop around `pipe()`."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import nn

from ..memory.cleanup import clean_up_after_block, handling_table, release_cached_memory
from ..memory.compile_caches import clear_compile_caches
from ..memory.error_locals import clearing_error_locals
from ..memory.owners import MASKS
from ..memory.recorder import CLEAN_UP, NoRecording
from .device_choice import check_attention_backend
from .frames import to_uint8_frames
from .settings import StreamSettings
from .state import StreamState
from .stream_pipeline import StreamPipeline

logger = logging.getLogger(__name__)

PassCallback = Callable[[int], None]


class BlockFailedError(RuntimeError):
    """A block is unusable; the blocks before it are good."""


@dataclass(frozen=True)
class StreamBlock:
    """One block of the stream.

    Attributes:
        index: 0 for the first.
        prompt: of the block.
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
                `kv_cache`; `decoder_cache` and `generator` make the seam invisible. None starts at the first frame.
            start_pictures: uint8 [F, height, width, 3], oldest first, that the stream goes on from; see
                `StreamPipeline.start_from_pictures`. They are encoded before the first block.

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
        self.next_block = 0
        self._state = StreamState(handling=handling_table(pipeline.recipe.state_rules))
        self._state.values.update(pipeline.start(settings))
        self._state.values.update(start_from or {})
        self._generator = self._state.get("generator") or pipeline.make_generator(settings.seed)
        self._expected_inputs = frozenset(pipeline.pipe.blocks.input_names)
        self._start_pictures = start_pictures
        self._inputs: Mapping[str, Any] = {}
        self._closed = False

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @clearing_error_locals
    def run_block(self, prompt: str, inputs: Mapping[str, Any] | None = None) -> StreamBlock:
        """Make the next block.

        An error raised here holds no local variables of the functions in its traceback, so a kept error keeps nothing
        of the stream allocated.

        Args:
            prompt: of this block; the text encoder runs only when it differs from the block before.
            inputs: of the pipeline's call, for this block only: `input_pictures` and `strength` make it from a video.

        Raises:
            BlockFailedError: latents or pictures are not finite. The session is over.
        """
        if self._closed:
            raise ValueError("the session is closed: start a new one.")
        began = time.perf_counter()
        self._state.strip()
        self.recorder.begin_block(self.next_block, self.pipeline.pipe, self._state.values)
        self._inputs = inputs or {}
        self._encode(prompt)
        # Once per stream, and again after a text encoder evicted the rest: on each call ComfyUI's model management
        # goes through all its models and may empty the cache.
        if self.next_block == 0 or not self.pipeline.is_resident():
            self.pipeline.bring_components(self.settings)
            self.recorder.add("bring components")
        if self._start_pictures is not None:
            self._state.values.update(self.pipeline.start_from_pictures(self._start_pictures, self.settings))
            self._start_pictures = None
            self.recorder.add("start pictures")
        with self._watched_passes(), self.recorder.watching(self.pipeline.pipe):
            self._state = self._call_pipeline(prompt)
        self._check_finite()
        frames = self._take_frames()
        if clean_up_after_block(self.settings.cleanup, self.pipeline.device):
            self.recorder.add(CLEAN_UP, "cache emptied")
        self.recorder.end_block(self._state.values, frames)
        block = StreamBlock(
            index=self.next_block,
            prompt=prompt,
            frames=frames,
            seconds=time.perf_counter() - began,
            prompt_tokens_cut=self._state.get("prompt_tokens_cut", 0),
        )
        self.next_block += 1
        return block

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
                logger.warning("block %d is made again with more layers streamed: %s", self.next_block, error)
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

    def _encode(self, prompt: str) -> None:
        known = self._state.get("encoded_prompt")
        self.pipeline.encode_prompt(self._state, prompt)
        # Most blocks have the previous block's prompt: nothing ran, so nothing is recorded.
        if self._state.get("encoded_prompt") != known:
            self.recorder.add("text encode", "prompt changed" if self.next_block else "")

    def _call_inputs(self, prompt: str) -> dict[str, Any]:
        inputs = {
            **self.settings.pipeline_inputs(),
            **self._inputs,
            "prompt": [prompt],
            "block_idx": self.next_block,
            "generator": self._generator,
        }
        return {name: value for name, value in inputs.items() if name in self._expected_inputs}

    @contextmanager
    def _watched_passes(self) -> Iterator[None]:
        """Call `on_pass` before each forward of the transformer, in built-in and foreign pipelines."""
        transformer = getattr(self.pipeline.pipe, "transformer", None)
        if self.on_pass is None or not isinstance(transformer, nn.Module):
            yield
            return
        passes = 0

        def before_pass(module: nn.Module, arguments: Any) -> None:  # noqa: ANN401
            nonlocal passes
            if self.on_pass is not None:
                self.on_pass(passes)
            passes += 1

        hook = transformer.register_forward_pre_hook(before_pass)
        try:
            yield
        finally:
            hook.remove()

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
            f"block {self.next_block} has NaN or infinite {what}: the {self.next_block} blocks before it are kept; "
            f"{why}."
        )

    def _take_frames(self) -> torch.Tensor:
        videos = self._state.values.pop("videos", None)
        if videos is None:
            raise BlockFailedError(
                f"block {self.next_block} returned no 'videos': the pipeline's blocks do not follow the contract "
                "of a streaming pipeline."
            )
        try:
            return to_uint8_frames(videos)
        except ValueError as error:
            raise BlockFailedError(f"block {self.next_block}: {error}") from error
