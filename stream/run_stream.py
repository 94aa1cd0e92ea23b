"""Runs a session to its end and writes its blocks into sinks."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import torch

from ..memory.error_locals import clearing_error_locals
from ..memory.recorder import NoRecording
from .block_prompt import BlockPrompt
from .component_store import LoadCallback, ignore_load
from .direction import Direction
from .foreign_limits import refuse_mixes
from .given_pictures import GivenPictures
from .going_on import check_recipe, settings_to_go_on
from .looks import Look, look_away
from .recipe import Recipe
from .session import BlockFailedError, Session, StreamBlock
from .settings import INPUT_NAMES, StreamSettings
from .sinks import FrameSink
from .snapshot import StreamSnapshot
from .snapshot_tree import CannotSnapshotError
from .stream_pipeline import StreamPipeline
from .video_input import VideoUse

logger = logging.getLogger(__name__)

# How long a stream is does not depend on what its blocks take.
_LENGTHS = frozenset({"blocks", "frames_per_block"})


class StreamWatcher(Protocol):
    """Observes a stream; raising stops it."""

    def while_loading(self, component: str, done: int, total: int) -> None:
        """Called when `done` of `total` bytes of a component are loaded."""

    def before_pass(self, index: int) -> None:
        """Called before pass 0, 1, ... of the transformer within a block."""

    def after_block(self, block: StreamBlock) -> None:
        """Called after the sinks have the block."""


@dataclass(frozen=True)
class StreamReport:
    """The result of a stream.

    Attributes:
        blocks_made: blocks in the sinks.
        pictures: pictures in the sinks.
        seconds: wall time, including the loading of components.
        notices: sentences the user should read, such as a prompt that was cut or why the stream stopped early.
        settings: of the stream, with what was left to the memory decided.
        described: how the pipeline was made; see `StreamPipeline.describe`.
        snapshot: the stream after its last block; None unless it was asked for and could be taken.
        no_snapshot: why there is none, a sentence.
        video: what was taken of the input video; None without one.
    """

    blocks_made: int
    pictures: int
    seconds: float
    notices: tuple[str, ...]
    settings: StreamSettings
    described: dict[str, Any]
    snapshot: StreamSnapshot | None = None
    no_snapshot: str = ""
    video: VideoUse | None = None

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for text output; without the snapshot."""
        told = {
            "blocks_made": self.blocks_made,
            "pictures": self.pictures,
            "seconds": round(self.seconds, 3),
            "notices": list(self.notices),
            "video": None if self.video is None else asdict(self.video),
        }
        return self.settings.as_dict() | told | self.described


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
    on_look: Look = look_away,
) -> StreamReport:
    """Make `settings.blocks` blocks into the sinks.

    An unusable block ends the stream; the blocks before it are kept. On any error all sinks are closed and the
    stream's caches freed; the error holds no reference to them, however long it is kept.

    Args:
        pipeline: materialised.
        settings: of the stream.
        direction: what it shows.
        sinks: each gets every block, in order; closed at the end.
        watcher: observes progress; raising in it (cancel) stops the stream.
        recorder: of the memory timeline; None records nothing.
        keep_stream: whether the report gets a snapshot of the end, which costs one copy to the CPU.
        on_look: called many times within a pass where the pipeline computes on a CPU; raising in it stops the stream.

    Raises:
        ValueError: the pipeline cannot do what the settings ask, takes no such embeddings, or cannot go on from the
            stream of `direction.go_on`.
        MemoryError: the stream cannot fit the device; nothing was loaded.
        BlockFailedError: the first block is unusable.
        torch.OutOfMemoryError: the device ran out of memory, with what to change.
        OSError: a sink's disk is full.
    """
    began = time.perf_counter()
    recorder = recorder or NoRecording()
    embeds = direction.embeds
    notices: list[str] = []
    blocks_made = pictures = 0
    failed = True
    snapshot, no_snapshot = None, "no snapshot was asked for."
    try:
        if direction.go_on is not None:
            check_recipe(direction.go_on, pipeline.recipe)
            settings = settings_to_go_on(direction.go_on, settings)
        settings = replace(
            settings,
            embeds_given=embeds is not None,
            start_given=direction.start is not None,
            video_given=direction.video is not None,
        )
        pipeline.check_settings(settings)
        if direction.is_mixed:
            refuse_mixes(pipeline.recipe)
        pictures_given = GivenPictures(direction, pipeline, settings)
        given = None if embeds is None else pipeline.start_from_embeds(embeds)
        settings = pipeline.check_fit(settings)
        pipeline.on_load = _tell_both(pipeline.recipe, recorder, watcher)
        pipeline.on_look = on_look
        _note_ignored_settings(pipeline, settings, notices)
        with Session(
            pipeline,
            settings,
            watcher.before_pass,
            recorder,
            given,
            pictures_given.start,
            prompts_ahead=direction.prompts_ahead,
            going_on=direction.go_on,
        ) as session:
            for index in range(settings.blocks):
                prompt = BlockPrompt.of(given["encoded_prompt"] if given else direction.prompt_of(index))
                inputs = pictures_given.of_block(index, cut=prompt.cut)
                if inputs is None:
                    break
                block = session.run_block(prompt, inputs)
                shown = pictures_given.show(index, block.frames)
                for sink in sinks:
                    sink.write(shown)
                blocks_made += 1
                pictures += len(shown)
                _note_cut_prompt(block, notices)
                watcher.after_block(block)
            if keep_stream:
                snapshot, no_snapshot = _snapshot_of(session, pictures_given)
        failed = False
    except BlockFailedError as error:
        if blocks_made == 0:
            raise
        failed = False
        no_snapshot = f"it ended with a block that is unusable: {error}"
        logger.warning("%s", error)
        notices.append(str(error))
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(
            f"{pipeline.device} ran out of memory at block {blocks_made + 1}: choose a smaller width or height or "
            f"fewer context frames ({error}){recorder.explain_growth()}"
        ) from error
    finally:
        pipeline.on_load = ignore_load
        pipeline.on_look = look_away
        notices += _close_all(sinks, quietly=failed)
    # After the stream: only then is it known which kernels ran.
    described = pipeline.describe()
    notices = [*pipeline.recipe.notices, *described.pop("notices", []), *notices, *pictures_given.notices()]
    return StreamReport(
        blocks_made,
        pictures,
        time.perf_counter() - began,
        tuple(notices),
        settings,
        described,
        snapshot,
        no_snapshot,
        pictures_given.use(),
    )


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


def _note_ignored_settings(pipeline: StreamPipeline, settings: StreamSettings, notices: list[str]) -> None:
    """Note settings that were changed without effect: a repository's own blocks take only declared inputs."""
    taken, defaults = set(pipeline.pipe.blocks.input_names), StreamSettings()
    ignored = [
        f"{name} {getattr(settings, name)}"
        for name, input_name in INPUT_NAMES.items()
        if name not in _LENGTHS and input_name not in taken and getattr(settings, name) != getattr(defaults, name)
    ]
    if ignored:
        notices.append(f"The pipeline's blocks take no {', no '.join(ignored)}: these settings have no effect.")


def _note_cut_prompt(block: StreamBlock, notices: list[str]) -> None:
    if block.prompt_tokens_cut:
        notice = f"The prompt is {block.prompt_tokens_cut} tokens too long for the text encoder; its end was cut off."
        if notice not in notices:
            notices.append(notice)


def _close_all(sinks: Sequence[FrameSink], *, quietly: bool) -> list[str]:
    """Close every sink, even if one fails, and return their sentences for the user.

    The first failure is raised after all are closed, unless another error is propagating; other failures are
    logged.
    """
    said: list[str] = []
    failure: BaseException | None = None
    for sink in sinks:
        try:
            notice = sink.close()
        except BaseException as error:
            if quietly or failure is not None:
                logger.warning("closing %s failed too", type(sink).__name__, exc_info=True)
            failure = failure or error
        else:
            said += [notice] if notice else []
    if quietly:
        for notice in said:
            logger.warning("%s", notice)
    elif failure is not None:
        raise failure
    return said
