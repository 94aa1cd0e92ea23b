"""Streaming Block Sampler: makes the video, block after block."""

from __future__ import annotations

import json
from typing import Any

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
        start: Any = None,  # noqa: ANN401
        video: Any = None,  # noqa: ANN401
        strength: float = MIDDLE_STRENGTH,
        fit: str = FITS[0],
        video_end: str = VIDEO_ENDS[0],
    ) -> io.NodeOutput:
        """Stream the video."""
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
            embeds_given=conditioning is not None,
            start_given=start is not None,
            video_given=video is not None,
        )
        # Before anything is downloaded; what the recipe's own family takes is checked once it is known.
        choices.check(SIZE_STEP if pipeline.blocks == BUILT_IN_BLOCKS else 1)
        named = None if preset == FROM_MODEL else find_preset(preset)
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.conditioning import GIVEN_PROMPT, read_conditioning
        from ..stream.direction import Direction
        from ..stream.frames import to_image_batch
        from ..stream.materialise import materialise
        from ..stream.run_stream import run_stream
        from ..stream.sinks import FrameKeeper, Mp4Sink

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
        watcher.begin(settings)
        fps = choices.fps or used.fps
        file = Mp4Sink(host.new_temp_file("streamblocks", ".mp4"), fps=fps)
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
            direction = Direction(lambda _: prompt, embeds, given.start(fps), given.video(fps))
            report = run_stream(materialised, settings, direction, [file, keeper], watcher, recorder)
        except BaseException:
            # A kept error keeps this function's variables alive; the pictures are in the file.
            keeper.drop()
            watcher.say_what_is_kept(file)
            raise
        frames = keeper.frames()
        images = host.blocked_output("keep_frames is 'none', so there are no images: choose 'all' or 'last block'.")
        if frames is not None:
            images = to_image_batch(frames)
        shown = prompt if embeds is None else GIVEN_PROMPT
        applied = settings.as_dict() | {"prompt": shown, "fps": fps, "preset": used.name} | report.as_dict()
        applied["notices"] += [used.note] if used.note else []
        applied["notices"] += given.carry_sound(file.path, report, fps)
        applied |= given.applied()
        timeline = None if recorder is None else recorder.timeline()
        return io.NodeOutput(host.video_from_file(file.path), images, json.dumps(applied, indent=2), timeline)
