"""Load Streaming Pipeline: what to stream with, as a recipe."""

from __future__ import annotations

from pathlib import Path

from comfy_api.latest import io

from .. import host
from ..memory.cleanup import parse_state_rules
from ..stream.file_stamp import stamp_files
from ..stream.recipe import (
    ATTENTION_BACKENDS,
    BUILT_IN_BLOCKS,
    COMPILE_CHOICES,
    COMPILE_NOTHING,
    DTYPES,
    REPOSITORY_BLOCKS,
    Recipe,
    is_hub_id,
)
from ..stream.remote_code import REMOTE_CODE_VARIABLE, check_remote_code_allowed

RecipeType = io.Custom("STREAMBLOCKS_RECIPE")

MINI_MODEL = "mini (in the pack: coloured shapes at 64x64)"
TINY_MODEL = "tiny random model (made on the spot, to try the nodes)"
_MINI_FOLDER = Path(__file__).resolve().parent.parent / "models" / "mini"
HUB_MODEL = "hub id below"
# As saved workflows have them.
BLOCK_LABELS = {"built-in causal Wan": BUILT_IN_BLOCKS, "the repository's own": REPOSITORY_BLOCKS}
FROM_MODEL = "from the model"


class LoadStreamingPipeline(io.ComfyNode):
    """Describes a streaming pipeline; the sampler loads it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        folders = host.pipeline_folders()
        return io.Schema(
            node_id="StreamBlocksLoadPipeline",
            display_name="Load Streaming Pipeline",
            category="StreamBlocks",
            description=(
                "Chooses a block-autoregressive video model. Nothing is loaded here: the sampler loads it when "
                "it runs, and keeps it until another model is chosen."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[MINI_MODEL, TINY_MODEL, *folders, *host.transformer_files(), HUB_MODEL],
                    default=MINI_MODEL,
                    tooltip=(
                        "A folder in models/diffusers, or a single .safetensors or .pt file in models/diffusion_models "
                        "(Krea Realtime, Self-Forcing; Wan's original names). The mini model comes with the pack: "
                        "prompts such as 'a red circle moves right', at 64x64. The tiny one shows noise."
                    ),
                ),
                io.String.Input(
                    "hub_id",
                    default="",
                    tooltip=(
                        f"With model '{HUB_MODEL}': a Hugging Face repository, such as owner/name. "
                        "It is downloaded when the sampler runs."
                    ),
                ),
                io.String.Input(
                    "revision",
                    default="",
                    tooltip=(
                        "Commit, branch or tag of the hub repository; empty for its default. Remote code needs a "
                        "full commit."
                    ),
                ),
                io.Combo.Input(
                    "components",
                    options=[FROM_MODEL, *folders],
                    default=FROM_MODEL,
                    tooltip=(
                        "Where VAE, text encoder and tokenizer come from. A single file needs a diffusers folder "
                        "of Wan 2.1 here."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip=(
                        "Dtype to compute in. Auto: bfloat16 where the card has it, else float16; float32 on a CPU."
                    ),
                ),
                io.Combo.Input(
                    "attention_backend",
                    options=list(ATTENTION_BACKENDS),
                    default="native",
                    tooltip=(
                        "How attention is computed. Native (PyTorch) runs everywhere; flash, sage and xformers "
                        "need their packages."
                    ),
                ),
                io.Combo.Input(
                    "device",
                    options=host.device_names(),
                    default="auto",
                    tooltip="Where the model runs. Auto: where ComfyUI runs its models.",
                ),
                io.Combo.Input(
                    "compile",
                    options=list(COMPILE_CHOICES),
                    default=COMPILE_NOTHING,
                    tooltip=(
                        "torch.compile of the transformer: about a quarter faster on a GPU, after a wait of seconds "
                        "at the first two blocks. Needs Triton."
                    ),
                ),
                io.Combo.Input(
                    "blocks_from",
                    options=list(BLOCK_LABELS),
                    default=next(iter(BLOCK_LABELS)),
                    tooltip=(
                        "Which code runs the model: the pack's own causal Wan pipeline, or the blocks that a "
                        "diffusers modular repository brings."
                    ),
                ),
                io.Boolean.Input(
                    "trust_remote_code",
                    default=False,
                    tooltip=(
                        "Allow the repository's own Python code to run on your machine. Only tick it for code "
                        "you have read or whose author you trust. ComfyUI must also have been started with the "
                        f"environment variable {REMOTE_CODE_VARIABLE}=1, because a workflow can bring the tick with it."
                    ),
                ),
                io.String.Input(
                    "state_rules",
                    default="",
                    multiline=True,
                    advanced=True,
                    tooltip=(
                        "For foreign pipelines: what happens to entries of the pipeline's state between blocks, "
                        "one a line: 'key = drop', 'key = share' or 'key = copy'."
                    ),
                ),
            ],
            outputs=[
                RecipeType.Output(display_name="pipeline", tooltip="The description of the pipeline, for the sampler.")
            ],
        )

    @classmethod
    def fingerprint_inputs(cls, model: str | None, components: str | None, **_: object) -> str:
        """Run again when the files of the chosen model or components changed.

        ComfyUI gives None for an input that another node is connected to: its files are looked at when this node runs,
        which it does when what comes in changes.
        """
        paths = [host.resolve_model(name) for name in (model, components) if name is not None and "/" in name]
        return " ".join(stamp_files(path) for path in paths)

    @classmethod
    def execute(
        cls,
        model: str,
        hub_id: str,
        revision: str,
        components: str,
        dtype: str,
        attention_backend: str,
        device: str,
        compile: str,
        blocks_from: str,
        trust_remote_code: bool,
        state_rules: str,
    ) -> io.NodeOutput:
        """Make the recipe."""
        path = _model_path(model, hub_id.strip())
        blocks = BLOCK_LABELS[blocks_from]
        if blocks != BUILT_IN_BLOCKS and model in (MINI_MODEL, TINY_MODEL):
            raise ValueError(
                f"blocks_from is {blocks_from!r}: the model {model!r} brings none; choose the built-in ones."
            )
        if trust_remote_code:
            check_remote_code_allowed(path)
        parts = None if components == FROM_MODEL else host.resolve_model(components)
        return io.NodeOutput(
            Recipe(
                model=path,
                components=parts,
                revision=revision.strip() or None,
                blocks=blocks,
                trust_remote_code=trust_remote_code,
                dtype=dtype,
                device=device,
                attention_backend=attention_backend,
                compile=compile,
                state_rules=parse_state_rules(state_rules),
                stamp=" ".join(stamp_files(place) for place in (path, parts) if place is not None),
            )
        )


def _model_path(model: str, hub_id: str) -> str:
    if model == MINI_MODEL:
        return str(_MINI_FOLDER)
    if model == TINY_MODEL:
        return str(_tiny_model_folder())
    if model != HUB_MODEL:
        return host.resolve_model(model)
    if not hub_id:
        raise ValueError(f"hub_id is empty: with model '{HUB_MODEL}', give a repository such as owner/name.")
    if not is_hub_id(hub_id):
        raise ValueError(
            f"hub_id is {hub_id!r}: give a Hugging Face repository such as owner/name; a folder on this machine "
            "belongs into models/diffusers, where 'model' lists it."
        )
    return hub_id


def _tiny_model_folder() -> Path:
    folder = host.temp_folder() / "streamblocks_tiny_model"
    if not (folder / "model_index.json").is_file():
        # Imported here: diffusers takes seconds, and the pack must not slow ComfyUI's start.
        from ..wan.tiny_model import write_tiny_model

        write_tiny_model(folder)
    return folder
