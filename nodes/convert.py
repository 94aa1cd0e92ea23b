"""Convert Checkpoint: any readable transformer as one plain safetensors file."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from .. import host
from ..stream.file_stamp import stamp_files
from ..stream.recipe import AVERAGED_WEIGHTS, WEIGHT_CHOICES
from .byte_progress import ByteProgress, say_saved, saying_stopped

_BAR_STEPS = 100


class ConvertCheckpoint(io.ComfyNode):
    """Writes the transformer of a checkpoint to one file."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        return io.Schema(
            node_id="StreamBlocksConvertCheckpoint",
            display_name="Convert Checkpoint",
            category="StreamBlocks",
            description=(
                "Writes the transformer of a .pt, .pth, .bin, .ckpt or .safetensors file, or of a diffusers folder, as "
                "one .safetensors file with plain names into models/diffusion_models. No code of the file runs."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[*host.transformer_files(), *host.pipeline_folders()],
                    tooltip="A file in models/diffusion_models, or a folder in models/diffusers.",
                ),
                io.String.Input(
                    "name",
                    default="",
                    tooltip=(
                        "Of the new file in models/diffusion_models, may hold sub-folders; empty: the model's name. A "
                        "file that is there is never replaced."
                    ),
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHT_CHOICES),
                    default=AVERAGED_WEIGHTS,
                    tooltip=(
                        "Of a training checkpoint that holds both: the moving average of the weights, which the makers "
                        "use, or the weights as trained. Of other files, what they hold."
                    ),
                ),
            ],
            outputs=[io.String.Output(display_name="path", tooltip="Where the file is.")],
            hidden=[io.Hidden.unique_id, io.Hidden.extra_pnginfo],
            is_output_node=True,
        )

    @classmethod
    def fingerprint_inputs(cls, model: str | None, **_: object) -> str:
        """Run again when the chosen file changed."""
        return "" if model is None else stamp_files(host.resolve_model(model))

    @classmethod
    def execute(cls, model: str, name: str, weights: str) -> io.NodeOutput:
        """Write the file."""
        source = Path(host.resolve_model(model))
        stem = source.name if source.is_dir() else source.stem
        path = host.new_transformer_file(name.strip() or stem)
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..stream.convert import convert_checkpoint

        bar = host.StreamProgress(_BAR_STEPS, cls.hidden)
        text = ByteProgress(bar)

        def on_progress(done: int, total: int) -> None:
            bar.update(_BAR_STEPS * done // max(total, 1))
            text.show_writing(path.name, done, total)

        with saying_stopped(bar):
            convert_checkpoint(source, path, averaged=weights == AVERAGED_WEIGHTS, on_progress=on_progress)
        return io.NodeOutput(str(path), ui={"text": [say_saved(bar, path)]})
