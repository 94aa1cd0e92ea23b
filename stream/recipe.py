"""The immutable description of a pipeline that travels on ComfyUI's wires."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.checkpoint_error import shown
from ..checkpoints.lora_choice import LoraChoice
from ..memory.cleanup import StateRule
from ..ops.attention_backends import LIBRARY_BACKENDS
from ..ops.quantization import QuantizationSpec

BUILT_IN_BLOCKS = "built-in"
REPOSITORY_BLOCKS = "the repository's own"
BLOCK_SOURCES = (BUILT_IN_BLOCKS, REPOSITORY_BLOCKS)

DTYPES = ("auto", "bfloat16", "float16", "float32")
NATIVE_ATTENTION = "native"
# Names of diffusers' attention backends that need no download at run time, and of the pack's own.
ATTENTION_BACKENDS = (
    NATIVE_ATTENTION,
    "_native_cudnn",
    "_native_flash",
    "_native_efficient",
    "_native_math",
    "flash",
    "_flash_3",
    "sage",
    "xformers",
    "flex",
    *LIBRARY_BACKENDS,
)

# What a training checkpoint may hold both of: the moving average of the weights, and the weights as trained.
AVERAGED_WEIGHTS, TRAINED_WEIGHTS = "generator_ema", "generator"
WEIGHT_CHOICES = (AVERAGED_WEIGHTS, TRAINED_WEIGHTS)

# What a `LoadCallback` is told of a download, before the repository's name.
DOWNLOAD_OF = "download of "

COMPILE_NOTHING, COMPILE_TRANSFORMER = "off", "transformer"
COMPILE_CHOICES = (COMPILE_NOTHING, COMPILE_TRANSFORMER)

# The hub's rule: letters, digits, '-', '_' and '.', and neither part begins with a dot.
_HUB_ID = re.compile(r"[A-Za-z0-9_-][\w.-]*/[A-Za-z0-9_-][\w.-]*", re.ASCII)


@dataclass(frozen=True)
class Recipe:
    """How to make a pipeline; equal recipes make the same pipeline.

    Attributes:
        model: absolute path of a diffusers-layout folder or a single file, or a hub id (`owner/name`).
        components: absolute path of a diffusers folder, or a hub id, that VAE, text encoder and tokenizer come from;
            None: from `model`. Built-in blocks only.
        revision: commit, branch or tag of the hub repository; None for its default.
        blocks: one of `BLOCK_SOURCES`.
        dtype: one of `DTYPES`; "auto" is bfloat16 where a GPU computes in it, else float16; float32 on a CPU.
        device: "auto" or a torch device.
        attention_backend: one of `ATTENTION_BACKENDS`; built-in blocks only.
        compile: one of `COMPILE_CHOICES`; built-in blocks only.
        state_rules: additions to the table of state keys, for foreign pipelines.
        quantization: how weights are quantized while they are read; None for not at all. Built-in blocks only.
        loras: put on the transformer one after another, before it is quantized. Built-in blocks only.
        stamp: changes with the files of `model`, `components`, `vae`, `text_encoder`, `tokenizer` and `decoder`, so
            that a replaced checkpoint is loaded anew.
        vae: absolute path of a single file, or of a diffusers folder; None: from `components`. Built-in blocks only.
        text_encoder: like `vae`. Its tokenizer comes from inside the file, or else from `components` or `model`.
        weights: one of `WEIGHT_CHOICES`, of a training checkpoint that holds both; others have no choice. Built-in
            blocks only.
        tokenizer: absolute path of a file that holds one, or of a diffusers folder; None: see `text_encoder`. Built-in
            blocks only.
        decoder: absolute path of a single file of what decodes latents in the VAE's place; None: the VAE. Built-in
            blocks only.
    """

    model: str
    components: str | None = None
    revision: str | None = None
    blocks: str = BUILT_IN_BLOCKS
    dtype: str = "auto"
    device: str = "auto"
    attention_backend: str = NATIVE_ATTENTION
    compile: str = COMPILE_NOTHING
    state_rules: tuple[StateRule, ...] = ()
    quantization: QuantizationSpec | None = None
    loras: tuple[LoraChoice, ...] = ()
    stamp: str = ""
    vae: str | None = None
    text_encoder: str | None = None
    weights: str = AVERAGED_WEIGHTS
    tokenizer: str | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        """Check the values that can be checked without disk or device.

        Raises:
            ValueError: a value is not allowed, or the repository's own blocks would ignore it.
        """
        if not self.model:
            raise ValueError("model is empty: choose a folder, a .safetensors file or a hub id.")
        for name, place in (("model", self.model), ("components", self.components)):
            if place is not None and not is_hub_id(place) and not Path(place).is_absolute():
                raise ValueError(f"{name} is {shown(place)}: give an absolute path, or a hub id such as owner/name.")
        for name in ("vae", "text_encoder", "tokenizer", "decoder"):
            file = getattr(self, name)
            if file is not None and not Path(file).is_absolute():
                raise ValueError(f"{name} is {shown(file)}: give the absolute path of a file.")
        _check_choice("blocks", self.blocks, BLOCK_SOURCES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("weights", self.weights, WEIGHT_CHOICES)
        _check_choice("compile", self.compile, COMPILE_CHOICES)
        _check_choice("attention_backend", self.attention_backend, ATTENTION_BACKENDS)
        if self.blocks != BUILT_IN_BLOCKS:
            self._refuse_what_only_built_in_blocks_do()

    def _refuse_what_only_built_in_blocks_do(self) -> None:
        quantization = None if self.quantization is None else self.quantization.format
        for name, value, neutral in (
            ("quantization", quantization, None),
            ("lora", next((choice.path for choice in self.loras), None), None),
            ("compile", self.compile, COMPILE_NOTHING),
            ("attention_backend", self.attention_backend, NATIVE_ATTENTION),
            ("components", self.components, None),
            ("vae", self.vae, None),
            ("text_encoder", self.text_encoder, None),
            ("weights", self.weights, AVERAGED_WEIGHTS),
            ("tokenizer", self.tokenizer, None),
            ("decoder", self.decoder, None),
        ):
            if value != neutral:
                raise ValueError(
                    f"{name} is {shown(value)}, and {self.blocks} blocks do not use it: choose the blocks "
                    f"{BUILT_IN_BLOCKS!r}, or for {name} {'none' if neutral is None else repr(neutral)}."
                )

    @property
    def is_hub_id(self) -> bool:
        """Whether `model` names a hub repository rather than something on this disk."""
        return is_hub_id(self.model)

    @property
    def notices(self) -> tuple[str, ...]:
        """What the user should know about the choices themselves."""
        if self.revision is None or self.is_hub_id:
            return ()
        return (
            f"revision {shown(self.revision)} has no effect: the model {Path(self.model).name} is on this disk, and "
            "only a hub repository has revisions.",
        )


def is_hub_id(model: str) -> bool:
    """Whether `model` is `owner/name`. Local models are named by absolute paths, which never match."""
    return _HUB_ID.fullmatch(model) is not None


def _check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {shown(value)}: choose one of {', '.join(allowed)}.")
