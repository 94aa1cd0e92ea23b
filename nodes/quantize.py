"""Quantize Pipeline and Save Quantized Model: weights in FP8 or INT8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from comfy_api.latest import io

from .. import host
from ..ops.quantization import WEIGHT_GRANULARITIES, QuantizationSpec
from ..stream.recipe import Recipe
from .byte_progress import ByteProgress, say_saved, saying_stopped
from .loader import RecipeType
from .savable_formats import QUANTIZE_NODE, SAVE_NODE, check_savable, check_saved_formats

NOT_QUANTIZED = "none"
# "static" is available from Python only: it needs a calibration run, which a graph cannot express.
NODE_ACTIVATIONS = ("dynamic per row", "dynamic per tensor", "none")
# Steps of Save Quantized Model's progress bar: total, and for loading, which takes about as long as writing.
_BAR_STEPS, _LOADING_STEPS = 100, 50


class QuantizePipeline(io.ComfyNode):
    """Chooses how a pipeline's weights are quantized while they are loaded."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id=QUANTIZE_NODE,
            display_name="Quantize Pipeline",
            category="StreamBlocks",
            description=(
                "Quantizes each layer as it is read: the unquantized model need not fit. Nothing is loaded here: "
                "after a change, the next run unloads the old weights first."
            ),
            inputs=[
                RecipeType.Input("pipeline", tooltip="From Load Streaming Pipeline."),
                io.Combo.Input(
                    "format",
                    options=["fp8", "int8", NOT_QUANTIZED],
                    default="fp8",
                    tooltip=(
                        "FP8 halves the weights and is faster on cards with FP8 units (RTX 40 and newer, H100). INT8 "
                        "halves them on any card and needs torchao."
                    ),
                ),
                io.Combo.Input(
                    "weight_granularity",
                    options=list(WEIGHT_GRANULARITIES),
                    default="per row",
                    tooltip="One scale per output feature is more exact; FP8 can be saved only with one per tensor.",
                ),
                io.Combo.Input(
                    "activations",
                    options=list(NODE_ACTIVATIONS),
                    default="dynamic per row",
                    tooltip=(
                        "How the layers' inputs are quantized. Per row handles outliers best; 'none' quantizes "
                        "weights only: exact inputs, no gain in speed."
                    ),
                ),
                io.Boolean.Input(
                    "fast_accumulation",
                    default=True,
                    tooltip="FP8: faster sums with fewer bits in the tensor cores. No difference was seen in pictures.",
                ),
                io.Boolean.Input(
                    "text_encoder",
                    default=False,
                    tooltip="Quantize the text encoder too (11 GB in bfloat16). The VAE never is.",
                ),
                io.String.Input(
                    "skip",
                    default="",
                    multiline=True,
                    tooltip=(
                        "Layers that are not quantized, one pattern per line, such as blocks.0.* or *.ffn.*; for the "
                        "text encoder, begin the line with text_encoder:."
                    ),
                ),
            ],
            outputs=[RecipeType.Output(display_name="pipeline", tooltip="The pipeline, to be quantized when loaded.")],
            hidden=[io.Hidden.prompt],
        )

    @classmethod
    def execute(
        cls,
        pipeline: Recipe,
        format: str,
        weight_granularity: str,
        activations: str,
        fast_accumulation: bool,
        text_encoder: bool,
        skip: str,
    ) -> io.NodeOutput:
        """Make the new recipe."""
        check_saved_formats(None if cls.hidden is None else cls.hidden.prompt)
        if format == NOT_QUANTIZED:
            return io.NodeOutput(replace(pipeline, quantization=None))
        if pipeline.quantization is not None:
            raise ValueError(
                f"pipeline is quantized already ({pipeline.quantization.format}): use one Quantize Pipeline node, or "
                f"set the first one to '{NOT_QUANTIZED}'."
            )
        spec = QuantizationSpec(
            format=format,
            weight_granularity=weight_granularity,
            activations=activations,
            fast_accumulation=fast_accumulation,
            components=("transformer", "text_encoder") if text_encoder else ("transformer",),
            skip=tuple(line.strip() for line in skip.splitlines() if line.strip()),
        )
        return io.NodeOutput(replace(pipeline, quantization=spec))


class SaveQuantizedModel(io.ComfyNode):
    """Writes the quantized transformer to one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id=SAVE_NODE,
            display_name="Save Quantized Model",
            category="StreamBlocks",
            description=(
                "Saves the quantized transformer as one .safetensors file in ComfyUI's own quantized format. Load "
                "Streaming Pipeline and ComfyUI's Load Diffusion Model both read it."
            ),
            inputs=[
                RecipeType.Input("pipeline", tooltip="From Quantize Pipeline."),
                io.String.Input(
                    "filename_prefix",
                    default="diffusion_models/streamblocks",
                    tooltip="Below the output folder. ComfyUI also looks for models in output/diffusion_models.",
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, pipeline: Recipe, filename_prefix: str) -> io.NodeOutput:
        """Load, quantize and save."""
        if pipeline.quantization is None:
            raise ValueError("pipeline is not quantized: put a Quantize Pipeline node before this one.")
        check_savable(pipeline.quantization.format, pipeline.quantization.weight_granularity)
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.materialise import materialise
        from ..stream.save_quantized import save_quantized_pipeline

        path, _ = host.new_output_file(filename_prefix, ".safetensors", width=0, height=0)
        watcher = _SaveWatcher(path.name, cls.hidden)
        with saying_stopped(watcher.progress):
            materialised = materialise(
                pipeline,
                residency=host.ComfyResidency(),
                default_device=host.default_device(),
                on_load=watcher.while_loading,
            )
            save_quantized_pipeline(materialised, path, watcher)
        return io.NodeOutput(str(path), ui={"text": [say_saved(watcher.progress, path)]})


class _SaveWatcher:
    """Shows loading and writing on the node, and stops them when the user cancels."""

    def __init__(self, file_name: str, hidden: Any) -> None:  # noqa: ANN401
        self._file_name = file_name
        self.progress = host.StreamProgress(_BAR_STEPS, hidden)
        self._text = ByteProgress(self.progress)

    def while_loading(self, component: str, done: int, total: int) -> None:
        self.progress.update(_LOADING_STEPS * done // max(total, 1))
        self._text.show_loading(component, done, total)

    def while_writing(self, done: int, total: int) -> None:
        self.progress.update(_LOADING_STEPS + (_BAR_STEPS - _LOADING_STEPS) * done // max(total, 1))
        self._text.show_writing(self._file_name, done, total)
