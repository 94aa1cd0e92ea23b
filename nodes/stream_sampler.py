"""Streaming Block Sampler: makes the video, block after block."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from .. import host
from ..families.kv_policies import KV_AUTO
from ..families.step_list import StepList
from ..memory.cleanup import CleanupPolicy
from ..memory.owners import OTHER_MODELS, PICTURES
from ..memory.recorder import TimelineRecorder
from ..stream.choices import StreamChoices
from ..stream.keep_frames import KeepFrames
from ..stream.known_families import find_preset
from ..stream.picture_choices import FITS, MIDDLE_STRENGTH, VIDEO_ENDS
from ..stream.prompt_track import PromptTrack
from ..stream.recipe import BUILT_IN_BLOCKS, Recipe
from .given_pictures import GivenPictures
from .memory_chart import MemoryChart
from .memory_nodes import TimelineType
from .node_watcher import NodeWatcher
from .sampler_inputs import (
    FROM_MODEL,
    SIZE_STEP,
    TIMELINE_EXACT,
    TIMELINE_OFF,
    TIMELINE_ON,
    UNSET,
    UNSET_SINK,
    sampler_inputs,
)
from .stream_socket import stream_output

if TYPE_CHECKING:
    from ..stream.snapshot import StreamSnapshot


class StreamingBlockSampler(io.ComfyNode):
    """Streams a video into a file, at flat memory."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksSampler",
            display_name="Streaming Block Sampler",
            category="StreamBlocks",
            description=(
                "Makes a video block by block at flat memory, however long it gets. The mp4 grows while it runs; "
                "cancel keeps the blocks already made in ComfyUI's temp folder."
            ),
            inputs=sampler_inputs(),
            outputs=[
                io.Video.Output(display_name="video", tooltip="The whole video, as a file."),
                io.Image.Output(display_name="images", tooltip="The pictures kept, by keep_frames."),
                io.String.Output(display_name="settings", tooltip="What was applied and measured, as JSON."),
                TimelineType.Output(display_name="timeline", tooltip="For Stream Memory Report."),
                stream_output(),
            ],
            hidden=[io.Hidden.unique_id],
        )

    @classmethod
    def execute(
        cls,
        pipeline: Recipe,
        prompt: str,
        seed: int,
        blocks: int,
        width: int,
        height: int,
        steps: int,
        shift: float,
        kv_policy: str,
        context_frames: int,
        sink_frames: int,
        attention_bias: float,
        fps: float,
        cleanup: str,
        keep_frames: str,
        memory_timeline: str = TIMELINE_ON,
        reset_compile: bool = False,
        conditioning: Any = None,  # noqa: ANN401
        preset: str = FROM_MODEL,
        frames_per_block: int = UNSET,
        timesteps: str = "",
        first_block_timesteps: str = "",
        memory_gb: float = UNSET,
        kv_format: str = KV_AUTO,
        on_prompt_change: str = FROM_MODEL,
        track: PromptTrack | None = None,
        go_on_from: StreamSnapshot | None = None,
        same_video: bool = False,
        keep_stream: bool = True,
        start: Any = None,  # noqa: ANN401
        video: Any = None,  # noqa: ANN401
        strength: float = MIDDLE_STRENGTH,
        fit: str = FITS[0],
        video_end: str = VIDEO_ENDS[0],
    ) -> io.NodeOutput:
        """Stream the video."""
        if track is not None and conditioning is not None:
            raise ValueError(
                "conditioning and track are both connected, and each is the prompt: disconnect one of them."
            )
        if start is not None and go_on_from is not None:
            raise ValueError(
                "start and go_on_from are both connected, and each is the stream's past: disconnect one of them."
            )
        choices = StreamChoices(
            width=width or None,
            height=height or None,
            fps=fps or None,
            steps=steps or None,
            shift=shift or None,
            kv_policy=None if kv_policy == FROM_MODEL else kv_policy,
            context_frames=context_frames or None,
            sink_frames=None if sink_frames == UNSET_SINK else sink_frames,
            attention_bias=attention_bias or None,
            frames_per_block=frames_per_block or None,
            timesteps=StepList.parse("timesteps", timesteps),
            first_block_timesteps=StepList.parse("first_block_timesteps", first_block_timesteps),
            blocks=blocks,
            seed=seed,
            cleanup=CleanupPolicy(cleanup),
            reset_compile=reset_compile,
            memory_gb=float(memory_gb),
            kv_format=kv_format,
            on_prompt_change=None if on_prompt_change == FROM_MODEL else on_prompt_change,
            embeds_given=conditioning is not None,
            start_given=start is not None,
            video_given=video is not None,
        )
        # Before anything is downloaded; what the recipe's own family takes is checked once it is known.
        choices.check(SIZE_STEP if pipeline.blocks == BUILT_IN_BLOCKS else 1)
        if track is not None:
            track.check(blocks)
        named = None if preset == FROM_MODEL else find_preset(preset)
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.block_clock import BlockClock
        from ..stream.conditioning import read_conditioning
        from ..stream.direction import Direction
        from ..stream.frames import to_image_batch
        from ..stream.going_on import check_recipe, seed_notice, settings_to_go_on, video_to_go_on
        from ..stream.materialise import materialise
        from ..stream.run_stream import run_stream
        from ..stream.sinks import FrameKeeper, Mp4Sink

        if go_on_from is not None:
            check_recipe(go_on_from, pipeline)
            fps = fps or go_on_from.fps or UNSET
        notices: list[str] = []
        earlier = None if go_on_from is None or not same_video else video_to_go_on(go_on_from, fps)
        embeds = None if conditioning is None else read_conditioning(conditioning)
        given = GivenPictures.read(start, video, strength=strength, fit=fit, video_end=video_end)
        node_id = None if cls.hidden is None else cls.hidden.unique_id
        progress = host.StreamProgress(1, node_id)
        watcher = NodeWatcher(progress)
        materialised = materialise(
            pipeline,
            residency=host.ComfyResidency(),
            default_device=host.default_device(),
            on_load=watcher.while_loading,
        )
        used = named or materialised.own_preset()
        settings = choices.complete(used)
        if go_on_from is not None:
            asked = choices.complete(named or go_on_from.settings)
            notices, settings = seed_notice(go_on_from, asked), settings_to_go_on(go_on_from, asked)
        watcher.begin(settings)
        fps = fps or used.fps
        clock = BlockClock.of(
            materialised.geometry,
            settings.frames_per_block,
            fps,
            goes_on=go_on_from is not None or start is not None,
        )
        placed = None if track is None else track.place(blocks, clock)
        direction = Direction.of(prompt, embeds, placed, go_on_from, given.start(fps), given.video(fps))
        file = Mp4Sink(host.new_temp_file("streamblocks", ".mp4"), fps=fps, begin_with=earlier)
        keeper = FrameKeeper(KeepFrames(keep_frames))
        recorder = None
        if memory_timeline != TIMELINE_OFF:
            recorder = TimelineRecorder(
                materialised.device,
                facts=materialised.memory_facts,
                exact=memory_timeline == TIMELINE_EXACT,
                others={PICTURES: keeper.held, OTHER_MODELS: host.other_models},
                on_record=MemoryChart(blocks, materialised.device, progress.show_memory),
            )
        try:
            report = run_stream(
                materialised, settings, direction, [file, keeper], watcher, recorder, keep_stream=keep_stream
            )
        except BaseException:
            # A kept error keeps this function's variables alive; the pictures are in the file.
            keeper.drop()
            watcher.say_what_is_kept(file)
            raise
        frames = keeper.frames()
        images = host.blocked_output("keep_frames is 'none', so there are no images: choose 'all' or 'last block'.")
        if frames is not None:
            images = to_image_batch(frames)
        applied = settings.as_dict() | direction.describe() | {"fps": fps, "preset": used.name} | report.as_dict()
        applied["notices"] += [*notices, *([used.note] if used.note else [])]
        applied["notices"] += given.carry_sound(file.path, report, fps, goes_on=go_on_from is not None)
        applied |= given.applied()
        timeline = None if recorder is None else recorder.timeline()
        why = report.no_snapshot if keep_stream else "keep_stream is off: switch it on."
        stream = host.blocked_output(f"This stream cannot be continued: {why}")
        if report.snapshot is not None:
            stream = report.snapshot.with_video(file.path, fps, file.frames_written)
        return io.NodeOutput(host.video_from_file(file.path), images, json.dumps(applied, indent=2), timeline, stream)
