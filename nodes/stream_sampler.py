"""Streaming Block Sampler: makes the video, block after block."""

from __future__ import annotations

import json
import logging
from typing import Any

from comfy_api.latest import io

from .. import host
from ..families.kv_policies import KV_POLICIES
from ..memory.cleanup import CleanupPolicy
from ..memory.owners import OTHER_MODELS, PICTURES
from ..memory.recorder import TimelineRecorder
from ..stream.keep_frames import KeepFrames
from ..stream.recipe import BUILT_IN_BLOCKS, Recipe
from ..stream.settings import StreamSettings
from ..wan.family import CAUSAL_WAN_21
from .byte_progress import ByteProgress
from .loader import RecipeType
from .memory_chart import MemoryChart
from .memory_nodes import TimelineType

logger = logging.getLogger(__name__)

GEOMETRY, DEFAULTS = CAUSAL_WAN_21.geometry, CAUSAL_WAN_21.defaults
SIZE_STEP = GEOMETRY.size_step
FIRST_PICTURES = GEOMETRY.pixel_frames(DEFAULTS.frames_per_block, from_the_start=True)
LATER_PICTURES = GEOMETRY.pixel_frames(DEFAULTS.frames_per_block, from_the_start=False)
TIMELINE_ON, TIMELINE_EXACT, TIMELINE_OFF = TIMELINE_MODES = ("on", "exact", "off")
MAX_SEED = 0xFFFFFFFFFFFFFFFF


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
            inputs=[
                RecipeType.Input("pipeline", tooltip="From Load Streaming Pipeline."),
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a red fox runs through fresh snow, morning light, handheld camera",
                    tooltip="What the video shows.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=MAX_SEED,
                    control_after_generate=True,
                    tooltip="The same seed and settings give the same video.",
                ),
                io.Int.Input(
                    "blocks",
                    default=9,
                    min=1,
                    max=1_000_000,
                    tooltip=(
                        f"How many blocks to make. A block is {DEFAULTS.frames_per_block} latent frames: "
                        f"{FIRST_PICTURES} pictures for the first, {LATER_PICTURES} for every other."
                    ),
                ),
                io.Int.Input(
                    "width",
                    default=DEFAULTS.width,
                    min=SIZE_STEP,
                    max=4096,
                    step=SIZE_STEP,
                    tooltip="Pixels, a multiple of 16. Krea and Self-Forcing were trained at 832x480.",
                ),
                io.Int.Input(
                    "height",
                    default=DEFAULTS.height,
                    min=SIZE_STEP,
                    max=4096,
                    step=SIZE_STEP,
                    tooltip="Pixels, a multiple of 16.",
                ),
                io.Int.Input(
                    "steps",
                    default=DEFAULTS.steps,
                    min=1,
                    max=100,
                    tooltip="Denoising steps per block. The models were distilled for 4.",
                ),
                io.Float.Input(
                    "shift",
                    default=DEFAULTS.shift,
                    min=0.01,
                    max=100.0,
                    step=0.1,
                    tooltip="Flow shift of the noise schedule. Wan 2.1 uses 5.",
                ),
                io.Combo.Input(
                    "kv_policy",
                    options=list(KV_POLICIES),
                    default=DEFAULTS.kv_policy,
                    tooltip=(
                        "How the past is kept. recompute (Krea) computes the context again for each block and drops "
                        "old errors; rolling (Self-Forcing) keeps a window of keys. Use the one that your model was "
                        "trained with."
                    ),
                ),
                io.Int.Input(
                    "context_frames",
                    default=DEFAULTS.context_frames,
                    min=1,
                    max=64,
                    tooltip="Latent frames of the past that a block sees. More costs memory and time.",
                ),
                io.Int.Input(
                    "sink_frames",
                    default=0,
                    min=0,
                    max=64,
                    advanced=True,
                    tooltip="With rolling: how many of the video's first latent frames stay in the window for good.",
                ),
                io.Float.Input(
                    "attention_bias",
                    default=1.0,
                    min=0.01,
                    max=1.0,
                    step=0.01,
                    tooltip=(
                        "Weight of past frames other than the first. 1 is off; around 0.3 lets the scene change "
                        "more and drift less."
                    ),
                ),
                io.Float.Input(
                    "fps",
                    default=DEFAULTS.fps,
                    min=1.0,
                    max=120.0,
                    step=1.0,
                    tooltip="Pictures per second. Wan makes 16.",
                ),
                io.Combo.Input(
                    "cleanup",
                    options=[policy.value for policy in CleanupPolicy],
                    default=CleanupPolicy.WHEN_IT_PAYS.value,
                    tooltip=(
                        "When torch's cached memory returns to the device. 'when it pays' waits until much of it is "
                        "unused; 'every block' costs speed."
                    ),
                ),
                io.Combo.Input(
                    "keep_frames",
                    options=[choice.value for choice in KeepFrames],
                    default=KeepFrames.LAST_BLOCK.value,
                    tooltip=(
                        "Which pictures the IMAGE output holds. 'all' needs RAM for the whole video; the mp4 "
                        "always has all of them."
                    ),
                ),
                io.Combo.Input(
                    "memory_timeline",
                    options=list(TIMELINE_MODES),
                    default=TIMELINE_ON,
                    tooltip=(
                        "Records what holds the memory, for the chart and Stream Memory Report. 'on' costs under 1 % "
                        "of a block. 'exact' counts every live tensor where the device has no counters (CPU): slow."
                    ),
                ),
                io.Boolean.Input(
                    "reset_compile",
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Clear torch.compile's caches when the stream is over. The next stream compiles again; the "
                        "memory is rarely worth that time unless sizes change often."
                    ),
                ),
                io.Conditioning.Input(
                    "conditioning",
                    optional=True,
                    tooltip=(
                        "In the prompt's place: CLIP Text Encode with a umt5 text encoder (CLIP type wan). The "
                        "pipeline then needs and loads no text encoder of its own."
                    ),
                ),
            ],
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
    ) -> io.NodeOutput:
        """Stream the video."""
        settings = StreamSettings(
            width=width,
            height=height,
            blocks=blocks,
            seed=seed,
            steps=steps,
            shift=shift,
            kv_policy=kv_policy,
            context_frames=context_frames,
            sink_frames=sink_frames,
            attention_bias=attention_bias,
            cleanup=CleanupPolicy(cleanup),
            reset_compile=reset_compile,
            embeds_given=conditioning is not None,
        )
        if pipeline.blocks == BUILT_IN_BLOCKS:
            # Before anything is downloaded or loaded; what the recipe's own family takes is checked once it is known.
            GEOMETRY.check_size(width, height)
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.conditioning import GIVEN_PROMPT, read_conditioning
        from ..stream.frames import to_image_batch
        from ..stream.materialise import materialise
        from ..stream.run_stream import run_stream
        from ..stream.sinks import FrameKeeper, Mp4Sink

        embeds = None if conditioning is None else read_conditioning(conditioning)
        node_id = None if cls.hidden is None else cls.hidden.unique_id
        progress = host.StreamProgress(blocks * steps, node_id)
        watcher = _NodeWatcher(settings, progress)
        materialised = materialise(
            pipeline,
            residency=host.ComfyResidency(),
            default_device=host.default_device(),
            on_load=watcher.while_loading,
        )
        video = Mp4Sink(host.new_temp_file("streamblocks", ".mp4"), fps=fps)
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
            report = run_stream(materialised, settings, lambda _: prompt, [video, keeper], watcher, recorder, embeds)
        except BaseException:
            # A kept error keeps this function's variables alive; the pictures are in the file.
            keeper.drop()
            watcher.say_what_is_kept(video)
            raise
        frames = keeper.frames()
        images = host.blocked_output("keep_frames is 'none', so there are no images: choose 'all' or 'last block'.")
        if frames is not None:
            images = to_image_batch(frames)
        shown = prompt if embeds is None else GIVEN_PROMPT
        applied = settings.as_dict() | {"prompt": shown, "fps": fps} | report.as_dict()
        timeline = None if recorder is None else recorder.timeline()
        return io.NodeOutput(host.video_from_file(video.path), images, json.dumps(applied, indent=2), timeline)


class _NodeWatcher:
    """Shows a stream's progress on its node, and stops the stream when the user cancels."""

    def __init__(self, settings: StreamSettings, progress: host.StreamProgress) -> None:
        self._settings = settings
        self._progress = progress
        self._blocks_done = 0
        self._loading = ByteProgress(progress)

    def while_loading(self, component: str, done: int, total: int) -> None:
        host.throw_if_cancelled()
        self._loading.show(f"loading {component}", done, total)

    def before_pass(self, index: int) -> None:
        # Context and clean passes do not count: the user chose a number of denoising steps.
        done = self._blocks_done * self._settings.steps + min(index, self._settings.steps)
        self._progress.update(done)

    def after_block(self, block: Any) -> None:  # noqa: ANN401
        self._blocks_done = block.index + 1
        self._progress.show_picture(self._blocks_done * self._settings.steps, block.frames[-1])
        rate = len(block.frames) / block.seconds
        self._progress.say(f"block {self._blocks_done} of {self._settings.blocks}: {rate:.1f} pictures a second")

    def say_what_is_kept(self, video: Any) -> None:  # noqa: ANN401
        if video.frames_written == 0:
            return
        message = f"Stopped; the {video.frames_written} pictures made so far are in {video.path}"
        logger.warning(message)
        self._progress.say(message)
