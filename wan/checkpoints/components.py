"""Paths to components: what each component of a Wan pipeline is made of, and how it is built."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from ...checkpoints.checkpoint_files import CheckpointError, list_component_files, read_json
from ...checkpoints.component import Component, Prepare, prepare_nothing
from ...checkpoints.lora_choice import LoraChoice
from ...checkpoints.lora_rows import unchanged
from ...checkpoints.module_loading import without_tied
from ...checkpoints.quantization_plan import ComponentWeights
from ...checkpoints.safetensors_reading import index_tensors
from ...ops.quantization import QuantizationSpec
from ..transformer.joined_projections import fuse_self_attention, fused_rows, joined_name
from .layer_presets import PRESETS
from .lora_names import put_loras_on
from .single_file import recognise_single_file

PIPELINE_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")
TRANSFORMER_CLASS = "WanTransformer3DModel"
VAE_CLASS = "AutoencoderKLWan"

_SIXTEEN_BIT = frozenset({torch.float16, torch.bfloat16})


def check_pipeline_folder(folder: Path, components: Collection[str] = PIPELINE_COMPONENTS) -> None:
    """Raise CheckpointError unless `folder` is a folder with a sub-folder for each of `components`."""
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder: give the folder of a Wan pipeline in diffusers' layout.")
    absent = [name for name in components if not (folder / name).is_dir()]
    if absent:
        raise CheckpointError(
            f"{folder} lacks the sub-folder{'s' * (len(absent) > 1)} {', '.join(absent)}: give the folder "
            f"of a Wan pipeline in diffusers' layout, with {', '.join(components)}."
        )


def transformer_component(
    source: Path,
    *,
    dtype: torch.dtype,
    quantization: QuantizationSpec | None = None,
    loras: Sequence[LoraChoice] = (),
    prepare: Prepare = prepare_nothing,
) -> Component:
    """The transformer of a pipeline folder or of a single `.safetensors` file, self-attention fused.

    Parameters are `dtype`; for a 16-bit `dtype` those that diffusers keeps in float32 (norms, time embedder,
    modulation) are float32. A file that is quantized already comes out as it is stored, but for layers
    which one of `loras` changes: these are quantized again. Raises CheckpointError for anything but a Wan text-to-video
    transformer, and for LoRAs that do not belong to it.
    """
    component = Component(
        name="transformer",
        weights=_transformer_weights(source),
        dtype=dtype,
        build=_build_transformer,
        keep_fp32=keep_fp32_parts(WanTransformer3DModel, dtype),
        preset=PRESETS["transformer"],
        quantization=quantization,
        joined_rows=fused_rows,
        prepare=prepare,
    )
    return with_loras(component, loras) if loras else component


def with_loras(transformer: Component, loras: Sequence[LoraChoice]) -> Component:
    """The transformer with these LoRAs on it instead of those it has; raises CheckpointError, see `put_loras_on`."""
    weights = transformer.weights
    plain = {name: unchanged(source) for name, source in weights.sources.items()}
    changed, matches = put_loras_on(plain, loras, weights.path)
    return replace(transformer, weights=replace(weights, sources=changed, loras=matches))


def vae_component(folder: Path, *, dtype: torch.dtype, prepare: Prepare = prepare_nothing) -> Component:
    """The VAE of the pipeline `folder`; raises CheckpointError when it is of another class or incomplete."""
    config = with_defaults(AutoencoderKLWan, _config(folder, "vae", VAE_CLASS))
    return Component(
        name="vae",
        weights=ComponentWeights(folder, config, _folder_sources(folder, "vae", AutoencoderKLWan)),
        dtype=dtype,
        build=lambda config: AutoencoderKLWan.from_config(dict(config)),
        keep_fp32=keep_fp32_parts(AutoencoderKLWan, dtype),
        prepare=prepare,
    )


def text_encoder_component(
    folder: Path, *, dtype: torch.dtype, quantization: QuantizationSpec | None = None
) -> Component:
    """The UMT5 encoder of the pipeline `folder`; raises CheckpointError when it is another model or incomplete."""
    config = _config(folder, "text_encoder")
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"{folder / 'text_encoder'} holds a {config.get('model_type')} model, and Wan needs umt5: give "
            "the text encoder of a Wan pipeline."
        )
    full = UMT5Config.from_dict(config).to_dict()
    return Component(
        name="text_encoder",
        weights=ComponentWeights(folder, full, _folder_sources(folder, "text_encoder", UMT5EncoderModel)),
        dtype=dtype,
        build=lambda config: UMT5EncoderModel(UMT5Config.from_dict(dict(config))),
        keep_fp32=keep_fp32_parts(UMT5EncoderModel, dtype),
        preset=PRESETS["text_encoder"],
        quantization=quantization,
    )


def check_parts_go_together(components: Mapping[str, Component]) -> None:
    """Raise CheckpointError when VAE or text encoder belong to another transformer, by their configs."""
    transformer, vae, text_encoder = (components[name] for name in ("transformer", "vae", "text_encoder"))
    pairs = (
        (vae, vae.config["z_dim"], transformer.config["in_channels"], "latent channels"),
        (text_encoder, text_encoder.config["d_model"], transformer.config["text_dim"], "channels of embedded text"),
    )
    for part, given, taken, what in pairs:
        if given != taken:
            raise CheckpointError(
                f"the {part.name} in {part.weights.path} gives {given} {what} and the transformer in "
                f"{transformer.weights.path} takes {taken}: choose components that belong to the model."
            )


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the pipeline `folder`, without touching the network and without running code of its own."""
    check_pipeline_folder(folder, ["tokenizer"])
    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer'} holds no tokenizer that transformers can load ({error}): download it again."
        ) from error


def with_defaults(cls: type[nn.Module], config: Mapping[str, Any]) -> dict[str, Any]:
    """`config` with the defaults of diffusers' class for what it does not say: published configs say little."""
    parameters = inspect.signature(cls.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return defaults | dict(config)


def keep_fp32_parts(cls: type[nn.Module], dtype: torch.dtype) -> frozenset[str]:
    """The name parts whose parameters stay float32 when `cls` is loaded as `dtype`.

    diffusers keeps them for both 16-bit dtypes; transformers only for float16, whose range is too small
    for UMT5's `wo`, so in bfloat16 that encoder takes half the memory there.
    """
    needed = dtype == torch.float16 if issubclass(cls, UMT5EncoderModel) else dtype in _SIXTEEN_BIT
    return frozenset(getattr(cls, "_keep_in_fp32_modules", None) or ()) if needed else frozenset()


def _build_transformer(config: Mapping[str, Any]) -> nn.Module:
    transformer = WanTransformer3DModel.from_config(dict(config))
    fuse_self_attention(transformer)
    return transformer


def _transformer_weights(source: Path) -> ComponentWeights:
    if not source.is_dir():
        if not source.exists():
            raise CheckpointError(f"{source} does not exist: give a pipeline folder or a .safetensors file.")
        file = recognise_single_file(source)
        config = with_defaults(WanTransformer3DModel, file.config)
        return ComponentWeights(source, config, file.sources, file.spec, joined_name)
    config = with_defaults(WanTransformer3DModel, _config(source, "transformer", TRANSFORMER_CLASS))
    if config["image_dim"] is not None or config["in_channels"] != config["out_channels"]:
        raise CheckpointError(
            f"{source / 'transformer'} is an image-to-video transformer with {config['in_channels']} "
            "input channels: give a text-to-video one."
        )
    sources = _folder_sources(source, "transformer", WanTransformer3DModel)
    return ComponentWeights(source, config, sources, joined_name=joined_name)


def _folder_sources(folder: Path, component: str, cls: type[nn.Module]) -> Mapping[str, Any]:
    tied = getattr(cls, "_tied_weights_keys", None)
    sources = index_tensors(list_component_files(folder / component))
    return without_tied(sources, tied if isinstance(tied, Mapping) else {})


def _config(folder: Path, component: str, class_name: str | None = None) -> dict[str, Any]:
    """config.json of a component, which must be of the class `class_name` when that is given."""
    check_pipeline_folder(folder, [component])
    config = read_json(folder / component / "config.json")
    if class_name is not None and config.get("_class_name") != class_name:
        raise CheckpointError(
            f"{folder / component} holds a {config.get('_class_name')}, and {class_name} is needed: give a "
            "Wan text-to-video pipeline."
        )
    return config
