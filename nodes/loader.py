"""Load Streaming Pipeline: makes the recipe of the model to stream."""

from __future__ import annotations

from comfy_api.latest import io

from .. import host
from ..memory.cleanup import parse_state_rules
from ..stream.file_stamp import stamp_files
from ..stream.recipe import (
    ATTENTION_BACKENDS,
    AVERAGED_WEIGHTS,
    BUILT_IN_BLOCKS,
    COMPILE_CHOICES,
    COMPILE_NOTHING,
    DTYPES,
    REPOSITORY_BLOCKS,
    WEIGHT_CHOICES,
    Recipe,
)
from .found_by import search_aliases
from .model_choice import (
    HUB_MODEL,
    MINI_DECODER,
    MINI_MODEL,
    TINY_MODEL,
    components_path,
    mini_decoder_path,
    model_path,
)

RecipeType = io.Custom("STREAMBLOCKS_RECIPE")

# Saved workflows contain these labels.
BLOCK_LABELS = {"built-in causal Wan": BUILT_IN_BLOCKS, "the repository's own": REPOSITORY_BLOCKS}
FROM_MODEL = "from the model"
FROM_COMPONENTS = "from the components"
FROM_TEXT_ENCODER = "from the text encoder"
OWN_DECODER = "the VAE's own"


class LoadStreamingPipeline(io.ComfyNode):
    """Describes a streaming pipeline; the sampler loads it."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Inputs and outputs."""
        folders = host.diffusers_folders()
        pipelines = [name for name, folder in folders.items() if folder.has_model]
        return io.Schema(
            node_id="StreamBlocksLoadPipeline",
            display_name="Load Streaming Pipeline",
            category="StreamBlocks",
            **search_aliases("self forcing", "krea", "causal wan", "streaming video", "endless"),
            description=(
                "Chooses a block-autoregressive video model. Nothing is loaded here: the sampler loads it when "
                "it runs, and keeps it until you choose another model."
            ),
            inputs=[
                io.Combo.Input(
                    "model",
                    options=[MINI_MODEL, TINY_MODEL, *pipelines, *host.transformer_files(), HUB_MODEL],
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
                    options=[FROM_MODEL, MINI_MODEL, *folders],
                    default=FROM_MODEL,
                    tooltip=(
                        "Where VAE, text encoder and tokenizer come from, unless 'vae' and 'text_encoder' below name "
                        "files of their own: a diffusers folder of Wan. A saved mini model takes the mini's."
                    ),
                ),
                io.Combo.Input(
                    "dtype",
                    options=list(DTYPES),
                    default="auto",
                    tooltip=(
                        "Dtype to compute in. Auto: bfloat16 if the card supports it, else float16; float32 on a CPU."
                    ),
                ),
                io.Combo.Input(
                    "attention_backend",
                    options=list(ATTENTION_BACKENDS),
                    default="native",
                    tooltip=(
                        "How attention is computed. Native (PyTorch) runs everywhere; flash, sage and xformers "
                        "need their packages, flash3 needs fa3-fwd and a Hopper card, comfy_int8 needs comfy-kitchen. "
                        "8-bit: the fastest 8-bit attention that runs here."
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
                        "torch.compile of the transformer: about a quarter faster on a GPU, after seconds of "
                        "compilation in the first two blocks. Needs Triton."
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
                    # It stays for the order of the values in saved workflows.
                    default=False,
                    advanced=True,
                    tooltip=(
                        "Has no effect any more, since a workflow could bring the tick: a repository's own Python code "
                        "runs once you have allowed it on this machine, on the page after the first run that is "
                        "refused, or with tools/allow_code.py."
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
                io.Combo.Input(
                    "vae",
                    options=[FROM_COMPONENTS, *host.vae_files()],
                    default=FROM_COMPONENTS,
                    optional=True,
                    tooltip="A VAE of its own, from models/vae, such as wan_2.1_vae.safetensors (5B: wan2.2_vae).",
                ),
                io.Combo.Input(
                    "text_encoder",
                    options=[FROM_COMPONENTS, *host.text_encoder_files()],
                    default=FROM_COMPONENTS,
                    optional=True,
                    tooltip=(
                        "A text encoder of its own, from models/text_encoders, such as "
                        "umt5_xxl_fp8_e4m3fn_scaled.safetensors, which holds its tokenizer too. Not needed when the "
                        "sampler gets a conditioning."
                    ),
                ),
                io.Combo.Input(
                    "weights",
                    options=list(WEIGHT_CHOICES),
                    default=AVERAGED_WEIGHTS,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "Of a training checkpoint that holds both: the moving average of the weights, which the makers "
                        "use, or the weights as trained. Of other files, what they hold."
                    ),
                ),
                io.Combo.Input(
                    "tokenizer",
                    options=[FROM_TEXT_ENCODER, *folders, *host.text_encoder_files()],
                    default=FROM_TEXT_ENCODER,
                    optional=True,
                    advanced=True,
                    tooltip=(
                        "For a text encoder file without a tokenizer: a file in models/text_encoders that holds one, "
                        "such as another umt5 file, or a diffusers folder. By default it is looked for in the text "
                        "encoder's file, then in 'components'."
                    ),
                ),
                io.Combo.Input(
                    "decoder",
                    options=[OWN_DECODER, MINI_DECODER, *host.approximate_vae_files(), *host.vae_files()],
                    default=OWN_DECODER,
                    optional=True,
                    tooltip=(
                        "What makes pictures of latents. A tiny decoder from models/vae_approx or models/vae, such as "
                        "taew2_1, lighttaew2_1 or lightvaew2_1 (5B: taew2_2, lighttaew2_2), is many times as fast, and "
                        "loses detail. The VAE still encodes pictures. The mini model has one of its own."
                    ),
                ),
            ],
            outputs=[
                RecipeType.Output(display_name="pipeline", tooltip="The description of the pipeline, for the sampler.")
            ],
        )

    @classmethod
    def fingerprint_inputs(
        cls,
        model: str | None,
        components: str | None,
        vae: str | None = None,
        text_encoder: str | None = None,
        tokenizer: str | None = None,
        decoder: str | None = None,
        **_: object,
    ) -> str:
        """Run again when the files of the chosen model, components, VAE, text encoder, tokenizer or decoder changed.

        ComfyUI passes None for a connected input. Its files are checked when this node runs, which happens when the
        input's value changes.
        """
        names = (model, components, vae, text_encoder, tokenizer, decoder)
        paths = [host.resolve_model(name) for name in names if name is not None and "/" in name]
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
        state_rules: str,
        trust_remote_code: bool = False,
        vae: str = FROM_COMPONENTS,
        text_encoder: str = FROM_COMPONENTS,
        weights: str = AVERAGED_WEIGHTS,
        tokenizer: str = FROM_TEXT_ENCODER,
        decoder: str = OWN_DECODER,
    ) -> io.NodeOutput:
        """Make the recipe; `trust_remote_code` is for workflows of old and not read."""
        path = model_path(model, hub_id.strip())
        blocks = BLOCK_LABELS[blocks_from]
        if blocks != BUILT_IN_BLOCKS and model in (MINI_MODEL, TINY_MODEL):
            raise ValueError(
                f"blocks_from is {blocks_from!r}: the model {model!r} brings none; choose the built-in ones."
            )
        parts = None if components == FROM_MODEL else components_path(components)
        vae_file, text_file, tokenizer_place = (
            None if name in (FROM_COMPONENTS, FROM_TEXT_ENCODER) else host.resolve_model(name)
            for name in (vae, text_encoder, tokenizer)
        )
        decoder_file: str | None
        if decoder == MINI_DECODER:
            decoder_file = mini_decoder_path(model, vae_file or parts)
        else:
            decoder_file = None if decoder == OWN_DECODER else host.resolve_model(decoder)
        places = (path, parts, vae_file, text_file, tokenizer_place, decoder_file)
        return io.NodeOutput(
            Recipe(
                model=path,
                components=parts,
                revision=revision.strip() or None,
                blocks=blocks,
                dtype=dtype,
                device=device,
                attention_backend=attention_backend,
                compile=compile,
                state_rules=parse_state_rules(state_rules),
                stamp=" ".join(stamp_files(place) for place in places if place is not None),
                vae=vae_file,
                text_encoder=text_file,
                weights=weights,
                tokenizer=tokenizer_place,
                decoder=decoder_file,
            )
        )
