"""What a user sets on the Streaming Block Sampler.

Where the widget takes a number, 0 stands for "from the preset". Saved workflows know the widgets by their order.
"""

from __future__ import annotations

from comfy_api.latest import io

from ..families.kv_policies import KV_AUTO, KV_FORMATS, KV_POLICIES, PROMPT_CHANGES
from ..stream.known_families import FAMILIES, preset_names
from .loader import RecipeType
from .picture_inputs import live_inputs, picture_inputs
from .prompt_track import TrackType
from .run_inputs import run_inputs
from .saving_inputs import saving_inputs
from .stream_socket import going_on_inputs

SIZE_STEP = min(family.geometry.size_step for family in FAMILIES)
FROM_MODEL = "from the model"
UNSET, UNSET_SINK = 0, -1
MAX_SEED = 0xFFFFFFFFFFFFFFFF


def sampler_inputs() -> list[io.Input]:
    """The node's inputs, in the order of the page."""
    return [
        *_stream_inputs(),
        *run_inputs(),
        *_later_inputs(),
        *_track_inputs(),
        *going_on_inputs(),
        *picture_inputs(),
        *_length_inputs(),
        *live_inputs(),
        *saving_inputs(),
    ]


def _length_inputs() -> list[io.Input]:
    """The length in the viewer's own measure, or none."""
    return [
        io.Float.Input(
            "seconds",
            default=UNSET,
            min=UNSET,
            max=1_000_000.0,
            step=0.5,
            optional=True,
            tooltip=(
                "Length of the video: as many blocks as it takes, so the last one may end a little later. 0: as many "
                "as 'blocks' says."
            ),
        ),
        io.Boolean.Input(
            "endless",
            default=False,
            optional=True,
            tooltip=(
                "Go on until you press 'stop and keep' on this node, whatever 'blocks' and 'seconds' say. The file "
                "grows meanwhile; memory does not."
            ),
        ),
    ]


def _stream_inputs() -> list[io.Input]:
    """What the stream shows and how it is made."""
    return [
        RecipeType.Input("pipeline", tooltip="From Load Streaming Pipeline."),
        io.String.Input(
            "prompt",
            multiline=True,
            dynamic_prompts=True,
            default="a red circle moves right",
            tooltip=(
                "What the video shows. The mini model knows sentences such as this one; large models want a "
                "few sentences on subject, movement, light and camera."
            ),
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
                "How many blocks to make. With 3 latent frames a block, as most models have: 9 pictures for "
                "the first, 12 for every other."
            ),
        ),
        io.Int.Input(
            "width",
            default=UNSET,
            min=UNSET,
            max=4096,
            step=SIZE_STEP,
            tooltip="Pixels, a multiple of 16 (Wan 2.2: of 32). 0: the size the model was trained at.",
        ),
        io.Int.Input(
            "height",
            default=UNSET,
            min=UNSET,
            max=4096,
            step=SIZE_STEP,
            tooltip="Pixels, a multiple of 16 (Wan 2.2: of 32). 0: from the preset.",
        ),
        io.Int.Input(
            "steps",
            default=UNSET,
            min=UNSET,
            max=100,
            advanced=True,
            tooltip="Denoising steps per block. 0: from the preset; most models were distilled for 4.",
        ),
        io.Float.Input(
            "shift",
            default=UNSET,
            min=UNSET,
            max=100.0,
            step=0.1,
            advanced=True,
            tooltip="Flow shift of the noise schedule. 0: from the preset; most models have 5.",
        ),
        io.Combo.Input(
            "kv_policy",
            options=[*KV_POLICIES, FROM_MODEL],
            default=FROM_MODEL,
            advanced=True,
            tooltip=(
                "How the past is kept. recompute (Krea) computes the context again for each block and drops "
                "old errors; rolling (Self-Forcing) keeps a window of keys. Use the one that your model was "
                "trained with."
            ),
        ),
        io.Int.Input(
            "context_frames",
            default=UNSET,
            min=UNSET,
            max=64,
            advanced=True,
            tooltip="Latent frames of the past that a block sees; more costs memory and time. 0: from the preset.",
        ),
        io.Int.Input(
            "sink_frames",
            default=UNSET_SINK,
            min=UNSET_SINK,
            max=64,
            advanced=True,
            tooltip=(
                "With rolling: how many of the video's first latent frames stay in the window for good. "
                "-1: from the preset."
            ),
        ),
        io.Float.Input(
            "attention_bias",
            default=UNSET,
            min=UNSET,
            max=1.0,
            step=0.01,
            advanced=True,
            tooltip=(
                "Weight of past frames other than the first. 1 is off; around 0.3 lets the scene change "
                "more and drift less. 0: from the preset."
            ),
        ),
        io.Float.Input(
            "fps",
            default=UNSET,
            min=UNSET,
            max=120.0,
            step=1.0,
            advanced=True,
            tooltip="Pictures per second. 0: as many as the model was trained at; Wan 2.1 makes 16.",
        ),
    ]


def _later_inputs() -> list[io.Input]:
    """Inputs that workflows of earlier versions do not have."""
    return [
        io.Conditioning.Input(
            "conditioning",
            optional=True,
            tooltip=(
                "In the prompt's place: CLIP Text Encode with a umt5 text encoder (CLIP type wan). The "
                "pipeline then needs and loads no text encoder of its own."
            ),
        ),
        io.Combo.Input(
            "preset",
            options=[FROM_MODEL, *preset_names()],
            default=FROM_MODEL,
            optional=True,
            tooltip=(
                "Settings as the model's makers use them, for every input left at 0 (or 'from the model'). "
                "'from the model' goes by the model's file name, size and config; the settings output says "
                "what was used."
            ),
        ),
        io.Int.Input(
            "frames_per_block",
            default=UNSET,
            min=UNSET,
            max=8,
            optional=True,
            advanced=True,
            tooltip="Latent frames per block, as the model was trained. 0: from the preset; most have 3.",
        ),
        io.String.Input(
            "timesteps",
            default="",
            optional=True,
            advanced=True,
            tooltip=(
                "A list in the place of steps, such as '1000, 750, 500, 250', which the shift warps; "
                "'raw: 700, 500' is taken as it is. Empty: from the preset."
            ),
        ),
        io.String.Input(
            "first_block_timesteps",
            default="",
            optional=True,
            advanced=True,
            tooltip="Another list for the first block, which has no past to go on. Empty: from the preset.",
        ),
        io.Float.Input(
            "memory_gb",
            default=UNSET,
            min=UNSET,
            max=1024.0,
            step=0.5,
            optional=True,
            advanced=True,
            tooltip=(
                "GB of the device that the stream may take. Layers that do not fit are streamed from RAM while others "
                "compute: slower, with the same pictures. 0: what is free, after ComfyUI's other models have left."
            ),
        ),
        io.Combo.Input(
            "kv_format",
            options=list(KV_FORMATS),
            default=KV_AUTO,
            optional=True,
            advanced=True,
            tooltip=(
                "How keys and values of past frames are stored. INT8 and FP8 take half the memory or less, at a small "
                "cost in speed; INT8 is closer to the original. Auto: INT8 where many layers of the model would not "
                "fit the device otherwise."
            ),
        ),
    ]


def _track_inputs() -> list[io.Input]:
    """Prompts over time."""
    return [
        io.Combo.Input(
            "on_prompt_change",
            options=[FROM_MODEL, *PROMPT_CHANGES],
            default=FROM_MODEL,
            optional=True,
            advanced=True,
            tooltip=(
                "With rolling: whether a new prompt leaves the keys of past frames as they are, or has them computed "
                "again with it (LongLive), once per change. recompute keeps no keys: it always computes those of its "
                "context with the prompt of the block, so both choices are the same there."
            ),
        ),
        TrackType.Input(
            "track",
            optional=True,
            tooltip=(
                "Prompts over time, from Stream Prompt Track, Stream Prompt Then or a sampler. The prompt above is "
                "then ignored, unless the track has none; the settings output says which blocks had which prompt."
            ),
        ),
    ]
