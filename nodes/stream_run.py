"""One run of the Streaming Block Sampler, from its inputs to its outputs. Imports diffusers."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from .. import host
from ..families.stream_preset import StreamPreset
from ..memory.json_text import json_text
from ..memory.owners import OTHER_MODELS, PICTURES
from ..memory.recorder import TimelineRecorder
from ..stream.block_clock import BlockClock
from ..stream.choices import StreamChoices
from ..stream.code_consent import CodeNotAllowedError
from ..stream.compile_news import telling_of_compilation
from ..stream.conditioning import read_conditioning
from ..stream.direction import Direction
from ..stream.frame_inbox import FrameInbox
from ..stream.frames import to_image_batch
from ..stream.going_on import check_recipe, seed_notice, settings_to_go_on, video_to_go_on
from ..stream.keep_frames import KeepFrames
from ..stream.known_families import find_preset
from ..stream.materialise import materialise
from ..stream.prompt_track import PromptTrack
from ..stream.recipe import COMPILE_NOTHING
from ..stream.run_stream import run_stream
from ..stream.settings import StreamSettings
from ..stream.sinks import FrameKeeper, Mp4Sink
from ..stream.stream_pipeline import StreamPipeline
from ..stream.stream_report import StreamReport
from .asked_stream import asked_of
from .connected_pictures import ConnectedPictures, LiveFrames, carry_earlier_sound
from .live_run import LiveRun
from .memory_chart import MemoryChart
from .memory_messages import say_rung
from .node_watcher import NodeWatcher
from .run_inputs import TIMELINE_EXACT, TIMELINE_OFF
from .run_saving import RunSaving
from .sampler_inputs import FROM_MODEL, UNSET
from .sampler_values import SamplerValues
from .saving_inputs import RESUME_LAST
from .unfinished_video import UnfinishedVideo


class StreamRun:
    """Makes one stream.

    Args:
        values: of the node's inputs, checked.
        choices: what they choose.
        hidden: the node's hidden inputs, with its id, the prompt and the workflow; None outside of a prompt.

    Raises:
        ValueError: a connected stream, picture or conditioning cannot be used; nothing was loaded.
    """

    def __init__(self, values: SamplerValues, choices: StreamChoices, hidden: Any) -> None:  # noqa: ANN401
        self._values = values
        self._choices = choices
        self._named = None if values.preset == FROM_MODEL else find_preset(values.preset)
        self._notices: list[str] = []
        self._fps = values.fps
        self._earlier = None
        self._going_on: StreamSettings | None = None
        if values.go_on_from is not None:
            check_recipe(values.go_on_from, values.pipeline)
            asked = choices.complete(self._named or values.go_on_from.settings)
            self._notices += seed_notice(values.go_on_from, asked)
            self._going_on = settings_to_go_on(values.go_on_from, asked)
            self._fps = values.fps or values.go_on_from.fps or UNSET
            if values.same_video:
                self._earlier = video_to_go_on(values.go_on_from, self._fps)
        self._embeds = None if values.conditioning is None else read_conditioning(values.conditioning)
        self._pictures = ConnectedPictures.read(
            values.start,
            values.video,
            strength=values.strength,
            fit=values.fit,
            video_end=values.video_end,
            live=None if values.live is None else LiveFrames(FrameInbox(), values.live.node, self._while_waiting),
        )
        node = None if hidden is None else hidden.unique_id
        workflow = host.workflow_id(None if hidden is None else hidden.extra_pnginfo)
        resume = values.resume == RESUME_LAST
        self._saving = RunSaving(
            values.save_every,
            values.pipeline,
            resume=resume,
            keep_all=KeepFrames(values.keep_frames) is KeepFrames.ALL,
            node=node,
            workflow=workflow,
            # It looks at all pictures, and only a save or what is resumed is compared by it.
            asked=asked_of(values, self._pictures) if values.save_every or resume else "",
            extra=None if hidden is None else hidden.extra_pnginfo,
        )
        self._live = LiveRun(node, workflow, host.throw_if_cancelled, self._pictures.live)
        self._progress = host.StreamProgress(1, hidden, self._live.say)
        self._unfinished = UnfinishedVideo(self._progress, hidden)
        self._watcher = NodeWatcher(self._progress, lambda: self._live.news.is_watched)

    def execute(self) -> io.NodeOutput:
        """Load what is needed, make the stream, and give the node's outputs."""
        with self._live.open():
            try:
                made = self._make()
            except BaseException as error:
                self._watcher.say_stopped()
                self._live.say_how_it_ended(error)
                raise
            finally:
                self._saving.release()
            self._live.say_how_it_ended(None)
            return made

    def _make(self) -> io.NodeOutput:
        pipeline = self._materialise()
        preset = self._named or pipeline.own_preset()
        fps = self._fps or preset.fps
        settings, clock = self._settings(pipeline, preset, fps)
        settings = self._saving.settings(settings)
        direction = self._saving.direction(self._direction(settings, clock, fps))
        point = self._saving.point
        self._watcher.begin(settings, 0 if point is None else point.blocks)
        file = self._saving.sink(fps, self._earlier)
        keeper = FrameKeeper(KeepFrames(self._values.keep_frames))
        recorder = self._recorder(pipeline, settings, keeper)
        keep_stream = self._values.keep_stream
        try:
            with self._telling_of_compilation():
                report = run_stream(
                    pipeline,
                    settings,
                    direction,
                    [file, keeper, self._live],
                    self._watcher,
                    recorder,
                    keep_stream=keep_stream,
                    steering=self._live.steer(pipeline, settings, direction, fps, point),
                    on_look=host.throw_if_cancelled,
                    on_rung=lambda block, _, rung: say_rung(self._progress, block, rung),
                    saver=self._saving.saver(file),
                    resume=point,
                )
            if report.ran_out:
                self._live.ran_out = True
                self._progress.say("memory_ended", block=report.blocks_made + 1, pictures=report.pictures)
            applied = report.as_dict() | {"fps": fps, "preset": preset.name}
            applied["notices"] += [*self._notices, *([preset.note] if preset.note else [])]
            applied["notices"] += self._saving.notices
            applied["notices"] += self._pictures.carry_sound(
                file.path, report, fps, goes_on=self._values.go_on_from is not None
            )
            if self._earlier is not None:
                applied["notices"] += carry_earlier_sound(file.path, self._earlier, file.frames_written, fps)
            applied |= self._pictures.applied()
            if report.ran_out:
                # Its snapshots stay: there may be memory for the rest another time.
                self._saving.run_failed(file)
            else:
                self._saving.run_finished(file)
            return io.NodeOutput(
                host.video_from_file(file.path),
                _images(keeper),
                json_text(applied, indent=2),
                None if recorder is None else recorder.timeline(),
                self._stream(report, file, fps),
                _track(report),
                ui={"streamblocks": [_told_of_track(report)]},
            )
        except BaseException:
            # A kept error keeps this function's variables alive; the pictures are in the file.
            keeper.drop()
            self._watcher.kept_is_said = self._unfinished.keep(
                file, stays=self._saving.is_growing(file), saved_blocks=self._saving.blocks_to_go_on_behind()
            )
            self._saving.run_failed(file)
            raise

    def _materialise(self) -> StreamPipeline:
        try:
            return materialise(
                self._values.pipeline,
                residency=host.ComfyResidency(),
                default_device=host.default_device(),
                on_load=self._watcher.while_loading,
                allowed_code=host.allowed_code(),
            )
        except CodeNotAllowedError as error:
            host.ask_about_code(error.code)
            raise

    def _telling_of_compilation(self) -> AbstractContextManager[None]:
        if self._values.pipeline.compile == COMPILE_NOTHING:
            return nullcontext()
        return telling_of_compilation(self._watcher.compiling_begins, self._watcher.compiling_ends)

    def _while_waiting(self) -> None:
        self._watcher.while_waiting()
        self._live.wait_for_frames()

    def _settings(
        self, pipeline: StreamPipeline, preset: StreamPreset, fps: float
    ) -> tuple[StreamSettings, BlockClock]:
        """The settings, and which block shows which second."""
        settings = self._going_on or self._choices.complete(preset)
        clock = BlockClock.of(pipeline.geometry, settings.frames_per_block, fps, goes_on=self._values.goes_on)
        if self._values.seconds and not self._values.endless:
            track = self._values.track
            cuts = () if track is None else track.place(None, clock).cuts
            fresh = [block for block in cuts if block]
            settings = replace(settings, blocks=clock.blocks_for(self._values.seconds, fresh))
        return settings, clock

    def _direction(self, settings: StreamSettings, clock: BlockClock, fps: float) -> Direction:
        values = self._values
        placed = None if values.track is None else values.track.place(settings.planned_blocks, clock)
        video = self._pictures.video(fps)
        if placed is not None and placed.has_strength and video is None:
            self._notices.append("track: its strengths have no effect, because no video is connected.")
        return Direction.of(values.prompt, self._embeds, placed, values.go_on_from, self._pictures.start(fps), video)

    def _recorder(
        self, pipeline: StreamPipeline, settings: StreamSettings, keeper: FrameKeeper
    ) -> TimelineRecorder | None:
        mode = self._values.memory_timeline
        if mode == TIMELINE_OFF:
            return None
        return TimelineRecorder(
            pipeline.device,
            facts=pipeline.memory_facts,
            exact=mode == TIMELINE_EXACT,
            others={PICTURES: keeper.held, OTHER_MODELS: host.other_models},
            on_record=MemoryChart(settings.planned_blocks, pipeline.device, self._live.news.add_memory),
        )

    def _stream(self, report: StreamReport, file: Mp4Sink, fps: float) -> Any:  # noqa: ANN401
        """The stream to go on from, or a blocked output that says why there is none."""
        if report.snapshot is not None:
            return report.snapshot.with_video(file.path, fps, file.frames_written)
        why = report.no_snapshot if self._values.keep_stream else "keep_stream is off: switch it on."
        return host.blocked_output(f"This stream cannot be continued: {why}")


def _images(keeper: FrameKeeper) -> Any:  # noqa: ANN401
    frames = keeper.frames()
    if frames is None:
        return host.blocked_output("keep_frames is 'none', so there are no images: choose 'all' or 'last block'.")
    return to_image_batch(frames)


def _track(report: StreamReport) -> Any:  # noqa: ANN401
    """What the stream followed, for the track input of another run."""
    track = report.direction.as_track()
    if not (track.lines or track.values):
        return host.blocked_output("A conditioning was the prompt, and nothing was edited, so there is no track.")
    return PromptTrack.parse(track.written(), track.interpolation)


def _told_of_track(report: StreamReport) -> dict[str, Any]:
    """The same for the page, which can put it into the workflow."""
    track = report.direction.as_track()
    return {
        "track": track.written(),
        "interpolation": track.interpolation,
        "blocks": report.blocks_made,
        "edited": report.by_hand,
    }
