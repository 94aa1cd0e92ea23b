"""Paths to components: what each component of a Wan pipeline is made of, and how it is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from ...checkpoints.checkpoint_error import CheckpointError, shown_word
from ...checkpoints.checkpoint_files import list_component_files
from ...checkpoints.checkpoint_reading import index_tensors, read_checkpoint
from ...checkpoints.component import Component, Prepare, explaining_config, prepare_nothing
from ...checkpoints.json_text import read_json
from ...checkpoints.layer_numbers import check_layer_count
from ...checkpoints.lora_choice import LoraChoice
from ...checkpoints.lora_rows import unchanged
from ...checkpoints.module_loading import without_tied
from ...checkpoints.quantization_plan import ComponentWeights
from ...checkpoints.row_sources import RowSource
from ...ops.quantization import QuantizationSpec
from ..transformer.joined_projections import fuse_self_attention, fused_rows, joined_name
from ..vae.tiny_decoder import TinyDecoder, TinyDecoderConfig
from .class_defaults import with_defaults
from .config_bounds import check_transformer_config, text_encoder_arguments, vae_arguments
from .layer_presets import PRESETS
from .lora_names import put_loras_on
from .pipeline_folder import check_pipeline_folder
from .single_file import diffusers_names, recognise_single_file
from .text_encoder_file import recognise_text_encoder_file
from .tiny_decoder_file import is_tiny_decoder, recognise_tiny_decoder
from .transformer_building import build_transformer, check_complete
from .transformer_configs import TRANSFORMER_CLASSES, diffusers_config
from .vae_configs import checked_vae_config
from .vae_file import recognise_vae_file
from .wrapper_names import find_prefix, strip_wrappers

TEXT_ENCODER_LAYERS = "encoder.block"
VAE_CLASS = "AutoencoderKLWan"

_SIXTEEN_BIT = frozenset({torch.float16, torch.bfloat16})


def transformer_component(
    source: Path,
    *,
    dtype: torch.dtype,
    quantization: QuantizationSpec | None = None,
    loras: Sequence[LoraChoice] = (),
    averaged: bool = True,
    prepare: Prepare = prepare_nothing,
) -> Component:
    """The transformer of a pipeline folder or of a single file, self-attention fused.

    Parameters are `dtype`; for a 16-bit `dtype` those that diffusers keeps in float32 (norms, time embedder,
    modulation) are float32. Weights that are stored quantized stay in their stored format, but for layers which one of
    `loras` changes: these are quantized again. `averaged`: see `transformer_weights`. Raises CheckpointError for
    anything but a Wan text-to-video transformer, and for LoRAs that do not belong to it.
    """
    component = Component(
        name="transformer",
        weights=transformer_weights(source, averaged=averaged),
        dtype=dtype,
        build=_build_transformer,
        keep_fp32=keep_fp32_parts(WanTransformer3DModel, dtype),
        preset=PRESETS["transformer"],
        quantization=quantization,
        joined_rows=fused_rows,
        prepare=prepare,
        layers="blocks",
    )
    return with_loras(component, loras) if loras else component


def with_loras(transformer: Component, loras: Sequence[LoraChoice]) -> Component:
    """The transformer with these LoRAs on it instead of those it has; raises CheckpointError, see `put_loras_on`."""
    weights = transformer.weights
    plain = {name: unchanged(source) for name, source in weights.sources.items()}
    changed, matches = put_loras_on(plain, loras, weights.path)
    return replace(transformer, weights=replace(weights, sources=changed, loras=matches))


def vae_component(source: Path, *, dtype: torch.dtype, prepare: Prepare = prepare_nothing) -> Component:
    """The VAE of a pipeline folder or of a single file; raises CheckpointError for another class or a damaged file."""
    return Component(
        name="vae",
        weights=_vae_weights(source),
        dtype=dtype,
        build=lambda config: AutoencoderKLWan.from_config(vae_arguments(config)),
        keep_fp32=keep_fp32_parts(AutoencoderKLWan, dtype),
        prepare=prepare,
    )


def decoder_component(source: Path, *, dtype: torch.dtype, prepare: Prepare = prepare_nothing) -> Component:
    """What decodes in the VAE's place: a tiny decoder, or another VAE of the same latents, in a single file.

    Raises CheckpointError for anything else.
    """
    if source.is_dir():
        raise CheckpointError(f"{source} is a folder: give the file of a tiny decoder or of a VAE of Wan.")
    header = read_checkpoint(source)
    if not is_tiny_decoder(header.tensors):
        return replace(vae_component(source, dtype=dtype, prepare=prepare), name="decoder")
    return Component(
        name="decoder",
        weights=recognise_tiny_decoder(source, header),
        dtype=dtype,
        build=lambda config: TinyDecoder(TinyDecoderConfig(**config)),
        prepare=prepare,
    )


def text_encoder_component(
    source: Path, *, dtype: torch.dtype, quantization: QuantizationSpec | None = None
) -> Component:
    """The UMT5 encoder of a pipeline folder or of a single file; raises CheckpointError for anything else.

    A file that is quantized already comes out as it is stored, its products in full precision.
    """
    return Component(
        name="text_encoder",
        weights=_text_encoder_weights(source),
        dtype=dtype,
        build=_build_text_encoder,
        keep_fp32=keep_fp32_parts(UMT5EncoderModel, dtype),
        preset=PRESETS["text_encoder"],
        quantization=quantization,
        layers=TEXT_ENCODER_LAYERS,
    )


def check_parts_go_together(components: Mapping[str, Component]) -> None:
    """Raise CheckpointError when VAE, text encoder or decoder, where there is one, belong to another transformer.

    Configs are compared first, then names and shapes with those of the model that each config makes.
    """
    transformer, vae = components["transformer"], components["vae"]
    text_encoder, decoder = components.get("text_encoder"), components.get("decoder")
    _check_pair(vae, "z_dim", transformer, "in_channels", "latent channels")
    if text_encoder is not None:
        _check_pair(text_encoder, "d_model", transformer, "text_dim", "channels of embedded text")
    if decoder is not None:
        _check_decoder(decoder, vae)
    for part in (vae, text_encoder, decoder):
        if part is not None:
            part.check()


def _check_pair(part: Component, given: str, transformer: Component, taken: str, what: str) -> None:
    if part.config[given] != transformer.config[taken]:
        raise CheckpointError(
            f"the {part.name} in {part.weights.path} gives {part.config[given]} {what} and the transformer in "
            f"{transformer.weights.path} takes {transformer.config[taken]}: choose components that belong to the model."
        )


def _check_decoder(decoder: Component, vae: Component) -> None:
    given, wanted = (_picture_facts(part.config) for part in (decoder, vae))
    if given != wanted:
        raise CheckpointError(
            f"the decoder in {decoder.weights.path} takes {given[0]} latent channels, enlarges {given[1]} times and "
            f"makes {given[2]} pictures of a latent frame, and the VAE in {vae.weights.path} has {wanted[0]}, "
            f"{wanted[1]} and {wanted[2]}: choose a decoder that belongs to the model, or the VAE's own."
        )


def _picture_facts(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """Latent channels, and by how much a picture is wider and a clip longer than its latents."""
    if "z_dim" in config:
        return config["z_dim"], config["scale_factor_spatial"], config["scale_factor_temporal"]
    tiny = TinyDecoderConfig(**config)
    return tiny.latent_channels, tiny.spatial_scale, tiny.pictures_per_latent


def keep_fp32_parts(cls: type[nn.Module], dtype: torch.dtype) -> frozenset[str]:
    """The name parts whose parameters stay float32 when `cls` is loaded as `dtype`.

    diffusers keeps them for both 16-bit dtypes; transformers only for float16, whose range is too small
    for UMT5's `wo`, so the encoder takes half the memory in bfloat16.
    """
    needed = dtype == torch.float16 if issubclass(cls, UMT5EncoderModel) else dtype in _SIXTEEN_BIT
    return frozenset(getattr(cls, "_keep_in_fp32_modules", None) or ()) if needed else frozenset()


def _build_transformer(config: Mapping[str, Any]) -> nn.Module:
    transformer = build_transformer(config)
    fuse_self_attention(transformer)
    return transformer


def _build_text_encoder(config: Mapping[str, Any]) -> nn.Module:
    return UMT5EncoderModel(UMT5Config.from_dict(dict(config)))


def transformer_weights(source: Path, *, averaged: bool = True) -> ComponentWeights:
    """What the transformer in `source`, a pipeline folder or a single file, is made of; all of it is there.

    `averaged`: of a training checkpoint with both, take the exponential moving average of the weights.
    """
    if not source.is_dir():
        if not source.exists():
            raise CheckpointError(f"{source} does not exist: give a pipeline folder or a .safetensors file.")
        file = recognise_single_file(source, averaged=averaged)
        config = with_defaults(WanTransformer3DModel, file.config)
        return ComponentWeights(source, config, file.sources, file.spec, joined_name)
    written = _config(source, "transformer", TRANSFORMER_CLASSES)
    place = source / "transformer"
    config = with_defaults(WanTransformer3DModel, diffusers_config(place / "config.json", written))
    check_transformer_config(place / "config.json", config)
    if config["image_dim"] is not None or config["in_channels"] != config["out_channels"]:
        raise CheckpointError(
            f"{place} is an image-to-video transformer with {config['in_channels']} "
            "input channels: give a text-to-video one."
        )
    sources = _folder_sources(source, "transformer", WanTransformer3DModel)
    if written["_class_name"] != TRANSFORMER_CLASSES[0]:
        sources = _under_diffusers_names(place, sources)
    check_complete(place, config, sources)
    return ComponentWeights(source, config, sources, joined_name=joined_name)


def _vae_weights(source: Path) -> ComponentWeights:
    if not source.is_dir():
        return recognise_vae_file(source)
    config = checked_vae_config(source / "vae" / "config.json", _config(source, "vae", (VAE_CLASS,)))
    return ComponentWeights(source, config, _folder_sources(source, "vae", AutoencoderKLWan))


def _text_encoder_weights(source: Path) -> ComponentWeights:
    if not source.is_dir():
        file = recognise_text_encoder_file(source)
        return replace(file, config=_text_encoder_config(source, file.config))
    config = _config(source, "text_encoder")
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"{source / 'text_encoder'} holds a {shown_word(config.get('model_type'))} model, and Wan needs umt5: give "
            "the text encoder of a Wan pipeline."
        )
    place = source / "text_encoder"
    full = _text_encoder_config(place / "config.json", config)
    sources = _folder_sources(source, "text_encoder", UMT5EncoderModel)
    check_layer_count(place, "num_layers", full["num_layers"], sources, f"{TEXT_ENCODER_LAYERS}.")
    return ComponentWeights(source, full, sources)


def _text_encoder_config(place: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """The whole config of transformers' class; raises CheckpointError for a value that cannot be."""
    with explaining_config(place):
        full: dict[str, Any] = UMT5Config(**text_encoder_arguments(place, config)).to_dict()
    return full


def _folder_sources(folder: Path, component: str, cls: type[nn.Module]) -> Mapping[str, RowSource]:
    tied = getattr(cls, "_tied_weights_keys", None)
    sources = index_tensors(list_component_files(folder / component))
    return without_tied(sources, tied if isinstance(tied, Mapping) else {})


def _under_diffusers_names(folder: Path, stored: Mapping[str, RowSource]) -> dict[str, RowSource]:
    """The weights of a class that is not diffusers' own, which may have Wan's names, and wrappers around them."""
    plain = strip_wrappers(folder, stored, find_prefix(folder, stored))
    return {name: plain[original] for name, original in diffusers_names(folder, plain).items()}


def _config(folder: Path, component: str, class_names: Sequence[str] = ()) -> dict[str, Any]:
    """config.json of a component, which must be of one of the classes `class_names` when they are given."""
    check_pipeline_folder(folder, [component])
    config = read_json(folder / component / "config.json")
    if class_names and config.get("_class_name") not in class_names:
        raise CheckpointError(
            f"{folder / component} holds a {shown_word(config.get('_class_name'))}, and {class_names[0]} is needed: "
            "give a Wan text-to-video pipeline."
        )
    return config
