"""Runs a session to its end and writes its blocks into sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import torch

from ..memory.error_locals import clearing_error_locals
from ..memory.recorder import NoRecording
from .block_prompt import BlockPrompt
from .component_store import LoadCallback, ignore_load
from .device_choice import check_attention_backend
from .direction import Direction
from .foreign_limits import refuse_bias, refuse_mixes
from .given_pictures import GivenPictures
from .going_on import check_recipe, settings_to_go_on
from .live_block import Revised
from .looks import Look, look_away
from .memory_ladder import TellRung, tell_nobody
from .recipe import Recipe
from .run_notices import cut_prompt, ignored_settings
from .run_point import RunPoint
from .session import BlockFailedError, Session, StreamBlock
from .settings import StreamSettings
from .sinks import FrameSink, close_sinks
from .snapshot import StreamSnapshot
from .snapshot_tree import CannotSnapshotError
from .steering import Steering
from .stream_pipeline import StreamPipeline
from .stream_report import StreamReport
from .stream_saver import StreamSaver

logger = logging.getLogger(__name__)


class StreamWatcher(Protocol):
    """Observes a stream; raising stops it."""

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Called when `done` of `total` bytes of a component are loaded."""

    def before_pass(self, index: int) -> None:
        """Called before pass 0, 1, ... of the transformer within a block."""

    def after_block(self, block: StreamBlock) -> None:
        """Called after the sinks have the block."""


@dataclass
class _Made:
    """What a stream has made so far; `prompt_given` names embeddings that stand for every prompt."""

    direction: Direction
    prompt_given: str | None = None
    blocks: int = 0
    pictures: int = 0
    notices: list[str] = field(default_factory=list)
    snapshot: StreamSnapshot | None = None
    no_snapshot: str = "no snapshot was asked for."
    ran_out: bool = False


@clearing_error_locals
def run_stream(
    pipeline: StreamPipeline,
    settings: StreamSettings,
    direction: Direction,
    sinks: Sequence[FrameSink],
    watcher: StreamWatcher,
    recorder: NoRecording | None = None,
    *,
    keep_stream: bool = False,
    steering: Steering | None = None,
    on_look: Look = look_away,
    on_rung: TellRung = tell_nobody,
    saver: StreamSaver | None = None,
    resume: RunPoint | None = None,
) -> StreamReport:
    """Make `settings.blocks` blocks into the sinks, or blocks without end.

    An unusable block ends the stream, and so does one for which there is no memory, after all that could be done; the
    blocks before it are kept. On any other error all sinks are closed and the
    stream's caches freed; the error holds no reference to them, however long it is kept.

    Args:
        pipeline: materialised.
        settings: of the stream.
        direction: what it shows.
        sinks: each gets every block, in order; closed at the end.
        watcher: observes progress; raising in it (cancel) stops the stream.
        recorder: of the memory timeline; None records nothing.
        keep_stream: whether the report gets a snapshot of the end, which costs one copy to the CPU.
        steering: what people change meanwhile; None leaves the direction as it is.
        on_look: called many times within a pass where the pipeline computes on a CPU; raising in it stops the stream.
        on_rung: is told of what is done when the device runs out of memory.
        saver: saves the stream every few blocks, and where it ends early; None does not.
        resume: where the run stood whose snapshot is `direction.go_on`: it goes on, as if it had never ended. None
            begins a run.

    Raises:
        ValueError: the pipeline cannot do what the settings ask, takes no such embeddings, or cannot go on from the
            stream of `direction.go_on`.
        MemoryError: the stream cannot fit the device; nothing was loaded.
        BlockFailedError: the first block is unusable.
        torch.OutOfMemoryError: the device ran out of memory at the first block, with what to change.
        OSError: a sink's disk is full.
    """
    began = time.perf_counter()
    recorder = recorder or NoRecording()
    steering = steering or Steering()
    made = _Made(direction)
    if resume is not None:
        made.blocks, made.pictures = resume.blocks, resume.pictures
        steering.edited = resume.edited
    failed = True
    try:
        settings = _complete(pipeline, settings, direction)
        pictures_given = GivenPictures(
            direction, pipeline, settings, made=0 if resume is None else resume.block_pictures
        )
        given = None if direction.embeds is None else pipeline.start_from_embeds(direction.embeds)
        made.prompt_given = None if given is None else given["encoded_prompt"]
        settings = pipeline.check_fit(settings)
        pipeline.on_load = _tell_both(pipeline.recipe, recorder, watcher)
        pipeline.on_look = on_look
        made.notices += ignored_settings(pipeline, settings)
        with Session(
            pipeline,
            settings,
            watcher.before_pass,
            recorder,
            given,
            pictures_given.start,
            prompts_ahead=direction.prompts_ahead,
            going_on=direction.go_on,
            on_rung=on_rung,
            first_block=made.blocks,
            keeps_latents=saver is not None or keep_stream,
        ) as session:
            try:
                _make_blocks(made, session, pictures_given, steering, sinks, watcher, saver)
                if saver is not None:
                    saver.stream_finished()
            except BaseException:
                if saver is not None:
                    saver.stream_failed(session, made.direction, edited=steering.edited)
                raise
            finally:
                settings = session.settings
                made.notices += session.memory_notices()
            if keep_stream and not session.has_made_blocks:
                made.snapshot = direction.go_on
            elif keep_stream:
                _leave_last_bias(session, made)
                made.snapshot, made.no_snapshot = _snapshot_of(session, pictures_given)
        failed = False
    except BlockFailedError as error:
        if made.blocks == 0:
            raise
        failed = False
        made.no_snapshot = f"it ended with a block that is unusable: {error}"
        logger.warning("%s", error)
        made.notices.append(str(error))
    except torch.OutOfMemoryError as error:
        told = _out_of_memory(pipeline, settings, made, error) + recorder.explain_growth()
        if made.blocks == 0:
            raise torch.OutOfMemoryError(told) from error
        failed = False
        made.ran_out = True
        made.no_snapshot = f"it ended with a block for which there was no memory: {error}"
        logger.warning("%s", told)
        made.notices.append(told)
    finally:
        pipeline.on_load = ignore_load
        pipeline.on_look = look_away
        made.notices += close_sinks(sinks, quietly=failed)
    # After the stream: only then is it known which kernels ran.
    described = pipeline.describe()
    notices = [*pipeline.recipe.notices, *described.pop("notices", []), *made.notices, *pictures_given.notices()]
    notices += [] if saver is None else saver.notices
    return StreamReport(
        made.blocks,
        made.pictures,
        time.perf_counter() - began,
        tuple(notices),
        settings,
        described,
        made.direction.until(made.blocks),
        steering.edited or steering.stopped,
        made.snapshot,
        made.no_snapshot,
        pictures_given.use(),
        made.ran_out,
    )


def _complete(pipeline: StreamPipeline, settings: StreamSettings, direction: Direction) -> StreamSettings:
    """The settings with what the direction brings; refuses what the pipeline cannot do."""
    if direction.go_on is not None:
        check_recipe(direction.go_on, pipeline.recipe)
        settings = settings_to_go_on(direction.go_on, settings)
    settings = replace(
        settings,
        embeds_given=direction.embeds is not None,
        start_given=direction.start is not None,
        video_given=direction.video is not None,
    )
    pipeline.check_settings(settings)
    if direction.is_mixed:
        refuse_mixes(pipeline.recipe)
    if direction.least_bias is not None:
        refuse_bias(pipeline.recipe, direction.least_bias, pipeline.pipe.blocks.input_names)
        check_attention_backend(pipeline.recipe.attention_backend, pipeline.device, direction.least_bias)
    return settings


def _make_blocks(
    made: _Made,
    session: Session,
    pictures: GivenPictures,
    steering: Steering,
    sinks: Sequence[FrameSink],
    watcher: StreamWatcher,
    saver: StreamSaver | None,
) -> None:
    """Make the blocks of the stream into the sinks, and note what was made."""
    for index in steering.blocks(session.settings.planned_blocks, made.blocks):
        made.direction = direction = steering.direct(index, made.direction)
        prompt = BlockPrompt.of(made.prompt_given or direction.prompt_of(index))
        inputs = pictures.of_block(index, direction.strength_of(index), cut=prompt.cut)
        if inputs is None:
            return
        live = steering.live_block(partial(_revise, made, session, pictures, steering, index, inputs))
        if index == 0 and pictures.start is not None:
            # Behind the pictures of the start, which are shown along with the whole block.
            live = replace(live, show=None)
        block = session.run_block(prompt, inputs | direction.inputs_of(index, session.settings.attention_bias), live)
        direction = made.direction
        shown = pictures.show(index, block.frames)
        for sink in sinks:
            sink.write(shown)
        made.blocks += 1
        made.pictures += len(shown)
        made.notices += [notice for notice in cut_prompt(block) if notice not in made.notices]
        if saver is not None:
            saver.block_made(
                session, pictures, direction, blocks=made.blocks, pictures=made.pictures, edited=steering.edited
            )
        watcher.after_block(block)


def _revise(
    made: _Made,
    session: Session,
    pictures: GivenPictures,
    steering: Steering,
    index: int,
    inputs: Mapping[str, Any],
) -> Revised:
    """What a block is made of that is begun again for an edit, which is noted at this block."""
    made.direction = direction = steering.direct(index, made.direction)
    prompt = BlockPrompt.of(made.prompt_given or direction.prompt_of(index))
    again = pictures.again(inputs, direction.strength_of(index))
    return prompt, again | direction.inputs_of(index, session.settings.attention_bias)


def _out_of_memory(
    pipeline: StreamPipeline, settings: StreamSettings, made: _Made, error: torch.OutOfMemoryError
) -> str:
    """A sentence with the block, what would fit, and what is kept."""
    kept = f"; the {made.blocks} blocks before it are kept" if made.blocks > 1 else "; the block before it is kept"
    return (
        f"{pipeline.device} ran out of memory at block {made.blocks + 1}: choose {pipeline.what_would_fit(settings)} "
        f"({error}){kept if made.blocks else ''}."
    )


def _leave_last_bias(session: Session, made: _Made) -> None:
    """Have a stream that goes on begin with the attention bias that this one ended with."""
    bias = made.direction.bias_of(max(0, made.blocks - 1), session.settings.attention_bias)
    session.settings = replace(session.settings, attention_bias=bias)


def _snapshot_of(session: Session, given: GivenPictures) -> tuple[StreamSnapshot | None, str]:
    """A snapshot, or why there is none: a finished stream is not lost for want of one."""
    try:
        return session.snapshot().with_input(given.taken()), ""
    except (CannotSnapshotError, MemoryError, RuntimeError) as error:
        logger.warning("no snapshot of the stream: %s", error)
        return None, str(error)


def _tell_both(recipe: Recipe, recorder: NoRecording, watcher: StreamWatcher) -> LoadCallback:
    spec = recipe.quantization

    def call(component: str, done: int, total: int) -> None:
        # Weights are quantized as they are read: loading and quantizing are one stage.
        named = f"{component} as {spec.format}" if spec and component in spec.components else component
        recorder.while_loading(named, done, total)
        watcher.while_loading(component, done, total)

    return call
