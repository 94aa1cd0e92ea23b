"""Stream LoRA: a LoRA on the model, merged while it is loaded."""

from __future__ import annotations

from dataclasses import replace

from comfy_api.latest import io

from .. import host
from ..stream.file_stamp import stamp_files
from ..stream.recipe import LoraChoice, Recipe
from .loader import RecipeType

NO_LORA = "none"


class StreamLora(io.ComfyNode):
    """Puts a LoRA on a pipeline's transformer."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksLora",
            display_name="Stream LoRA",
            category="StreamBlocks",
            description=(
                "Puts a LoRA on the model: its changes are merged into each layer as it is read, before it is "
                "quantized, so a stream with a LoRA takes no more memory or time than one without. Several in a row "
                "add up."
            ),
            inputs=[
                RecipeType.Input("pipeline", tooltip="From Load Streaming Pipeline, or another Stream LoRA."),
                io.Combo.Input(
                    "lora",
                    options=[NO_LORA, *host.lora_files()],
                    default=NO_LORA,
                    tooltip=(
                        "A file in models/loras, made for a model of the same size. What it changed is in the "
                        "sampler's settings output."
                    ),
                ),
                io.Float.Input(
                    "strength",
                    default=1.0,
                    min=-20.0,
                    max=20.0,
                    step=0.01,
                    tooltip=(
                        "How strongly it changes the model: 1 as it was trained, 0 not at all. Another strength loads "
                        "the transformer anew, and nothing else."
                    ),
                ),
            ],
            outputs=[RecipeType.Output(display_name="pipeline", tooltip="The pipeline with the LoRA on it.")],
        )

    @classmethod
    def fingerprint_inputs(cls, lora: str | None, **_: object) -> str:
        """Run again when the file changed; None is an input that another node is connected to."""
        return "" if lora in (None, NO_LORA) else stamp_files(host.resolve_lora(str(lora)))

    @classmethod
    def execute(cls, pipeline: Recipe, lora: str, strength: float) -> io.NodeOutput:
        """Make the new recipe."""
        if lora == NO_LORA:
            return io.NodeOutput(pipeline)
        path = host.resolve_lora(lora)
        choice = LoraChoice(path, float(strength), stamp_files(path))
        return io.NodeOutput(replace(pipeline, loras=(*pipeline.loras, choice)))
