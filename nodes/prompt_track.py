"""Stream Prompt Track and Stream Prompt Then: prompts over time."""

from __future__ import annotations

from comfy_api.latest import io

from ..stream.block_prompt import INTERPOLATIONS, LINEAR
from ..stream.prompt_track import PromptTrack

TrackType = io.Custom("STREAMBLOCKS_PROMPT_TRACK")

_EXAMPLE = "0-3: a red circle moves right\n4->6: a blue circle moves right\n8: a blue circle moves up"
_HOW_TO_WRITE = (
    "One line per prompt, each with the blocks or seconds that it is for; block 0 is the first. '0-3: a calm sea' is "
    "blocks 0 to 3. "
    "'4: storm' lasts until the next line begins. '8->11: calm again' is a transition, a quarter more in each of four "
    "blocks. '2.5s-4s: fog' is in seconds, at the nearest block. '12 cut: a street' is a hard cut, with nothing of the "
    "past. 'a cat :0.7 || a dog :0.3' mixes prompts by weight. '20 strength 0.4: a robot' sets how much of the "
    "sampler's video is replaced from there on, 'bias 0.3' the attention bias; '9 strength 0.4:' without a prompt "
    "changes only that. '6 now: a robot' may begin within a transition or the blocks of the line before, which ends "
    "there. '7 exact: \"two\\nlines\"' takes a JSON string as it is. A line that begins with # is a comment."
)


class StreamPromptTrack(io.ComfyNode):
    """Reads a prompt track."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksPromptTrack",
            display_name="Stream Prompt Track",
            category="StreamBlocks",
            description=(
                "Prompts over time, for the sampler's track input. All of them are encoded before the first block, so "
                "the text encoder comes and goes once."
            ),
            inputs=[
                io.String.Input("text", multiline=True, dynamic_prompts=True, default=_EXAMPLE, tooltip=_HOW_TO_WRITE),
                io.Combo.Input(
                    "interpolation",
                    options=list(INTERPOLATIONS),
                    default=LINEAR,
                    tooltip=(
                        "How the text embeddings of several prompts are mixed, in transitions and by weight. linear: "
                        "their weighted sum. slerp: on the arc between them, which keeps their length."
                    ),
                ),
            ],
            outputs=[TrackType.Output(display_name="track", tooltip="For the sampler, or Stream Prompt Then.")],
        )

    @classmethod
    def execute(cls, text: str, interpolation: str) -> io.NodeOutput:
        """Read the lines; what depends on the stream is checked by the sampler."""
        return io.NodeOutput(PromptTrack.parse(text, interpolation))


class StreamPromptThen(io.ComfyNode):
    """Appends a prompt to a track."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksPromptThen",
            display_name="Stream Prompt Then",
            category="StreamBlocks",
            description="One prompt after another: then this one, for so many blocks. Connect several in a row.",
            inputs=[
                io.String.Input(
                    "prompt",
                    multiline=True,
                    dynamic_prompts=True,
                    default="a blue circle moves up",
                    tooltip="What these blocks show; 'a cat :0.7 || a dog :0.3' mixes prompts by weight.",
                ),
                io.Int.Input(
                    "blocks",
                    default=4,
                    min=0,
                    max=1_000_000,
                    tooltip="How many blocks it lasts. 0: to the end of the stream, as the last one in a row should.",
                ),
                io.Int.Input(
                    "transition_blocks",
                    default=0,
                    min=0,
                    max=1_000_000,
                    tooltip=(
                        "Over how many of these blocks it comes in, mixed with the prompt before: 2 or more. 0: at "
                        "once."
                    ),
                ),
                io.Boolean.Input(
                    "cut",
                    default=False,
                    tooltip="A hard cut: the first block sees nothing of the past, and begins a new scene.",
                ),
                TrackType.Input(
                    "track",
                    optional=True,
                    tooltip=(
                        "What comes before: another Stream Prompt Then, or a Stream Prompt Track whose last line has "
                        "an end. Nothing: this prompt is the first."
                    ),
                ),
            ],
            outputs=[TrackType.Output(display_name="track", tooltip="For the sampler, or another Stream Prompt Then.")],
        )

    @classmethod
    def execute(
        cls, prompt: str, blocks: int, transition_blocks: int, cut: bool, track: PromptTrack | None = None
    ) -> io.NodeOutput:
        """Append the prompt."""
        before = PromptTrack() if track is None else track
        return io.NodeOutput(before.then(prompt, blocks, transition=transition_blocks, cut=cut))
