"""Paths to modules: each component of a Wan pipeline, loaded straight onto its device in its dtype."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch
from accelerate import init_empty_weights
from diffusers.models.autoencoders.autoencoder_kl_wan import AutoencoderKLWan
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerBase, UMT5Config, UMT5EncoderModel

from ...checkpoints.checkpoint_files import CheckpointError, index_tensors, list_component_files, read_json
from ...checkpoints.module_loading import NO_FUSION, load_weights, without_tied
from ...checkpoints.quantization_plan import ComponentWeights, make_fillings, plan_component
from ...ops.quantization import QuantizationPlan, QuantizationSpec
from ...ops.weight_filling import replace_layer
from ..transformer.joined_projections import fuse_self_attention, fused_rows
from .layer_presets import PRESETS
from .single_file import recognise_single_file

PIPELINE_COMPONENTS = ("transformer", "vae", "text_encoder", "tokenizer", "scheduler")

OnTensor = Callable[[str, int], None]
ModuleT = TypeVar("ModuleT", bound=nn.Module)

_CLASSES: Mapping[str, type[nn.Module]] = {
    "transformer": WanTransformer3DModel,
    "vae": AutoencoderKLWan,
    "text_encoder": UMT5EncoderModel,
}
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


def load_transformer(
    source: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: QuantizationSpec | None = None,
    on_tensor: OnTensor | None = None,
) -> WanTransformer3DModel:
    """The transformer of a pipeline folder or of a single `.safetensors` file, self-attention fused.

    Parameters are `dtype`; for a 16-bit `dtype` those that diffusers keeps in float32 (norms, time embedder,
    modulation) are float32. With `quantization` the layers of `plan_transformer` are quantized as they are read, on
    `device`; a file that is quantized already comes out as it is stored. Raises CheckpointError for anything but a
    Wan text-to-video transformer and for quantizing twice, ValueError for what cannot be quantized as asked.
    """
    weights = _component_weights(source, "transformer")
    plan = _plan(weights, "transformer", dtype, quantization)
    with _empty_weights():
        transformer = WanTransformer3DModel.from_config(dict(weights.config))
    fuse_self_attention(transformer)
    _fill(transformer, weights, plan, device, dtype, on_tensor, fused=fused_rows(transformer))
    return _frozen(transformer)


def load_vae(
    folder: Path, *, device: torch.device | str, dtype: torch.dtype, on_tensor: OnTensor | None = None
) -> AutoencoderKLWan:
    """The VAE of the pipeline `folder`; raises CheckpointError when it cannot be loaded."""
    config = _config(folder, "vae", "AutoencoderKLWan")
    with _empty_weights():
        vae = AutoencoderKLWan.from_config(config)
    weights = _component_weights(folder, "vae")
    _fill(vae, weights, _plan(weights, "vae", dtype, None), device, dtype, on_tensor)
    return _frozen(vae)


def load_text_encoder(
    folder: Path,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    quantization: QuantizationSpec | None = None,
    on_tensor: OnTensor | None = None,
) -> UMT5EncoderModel:
    """The UMT5 encoder of the pipeline `folder`, quantized as it is read where `quantization` names it.

    Raises CheckpointError when it cannot be loaded, ValueError for what cannot be quantized as asked.
    """
    config = _config(folder, "text_encoder")
    if config.get("model_type") != "umt5":
        raise CheckpointError(
            f"{folder / 'text_encoder'} holds a {config.get('model_type')} model, and Wan needs umt5: give "
            "the text encoder of a Wan pipeline."
        )
    with _empty_weights():
        encoder = UMT5EncoderModel(UMT5Config.from_dict(config))
    weights = _component_weights(folder, "text_encoder")
    _fill(encoder, weights, _plan(weights, "text_encoder", dtype, quantization), device, dtype, on_tensor)
    return _frozen(encoder)


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of the pipeline `folder`, without touching the network."""
    check_pipeline_folder(folder, ["tokenizer"])
    try:
        return AutoTokenizer.from_pretrained(folder / "tokenizer", local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{folder / 'tokenizer'} holds no tokenizer that transformers can load ({error}): download it again."
        ) from error


def component_bytes(
    source: Path, component: str, dtype: torch.dtype, quantization: QuantizationSpec | None = None
) -> int:
    """Bytes of a component's parameters and persistent buffers once loaded so, from headers only.

    `component` is `transformer`, `vae` or `text_encoder`; `source` is what its loader takes. Tied weights
    count once. Raises ValueError for another component, CheckpointError for an unusable source.
    """
    return plan_for(source, component, dtype, quantization).bytes_after


def plan_transformer(
    source: Path, quantization: QuantizationSpec | None, dtype: torch.dtype = torch.bfloat16
) -> QuantizationPlan:
    """What `load_transformer` would do with each layer, from headers only; raises what it would raise for that."""
    return plan_for(source, "transformer", dtype, quantization)


def plan_for(
    source: Path, component: str, dtype: torch.dtype, quantization: QuantizationSpec | None
) -> QuantizationPlan:
    """`plan_transformer` for any of `transformer`, `vae` and `text_encoder`; ValueError for another component."""
    if component not in _CLASSES:
        raise ValueError(f"component is {component!r}, allowed are {', '.join(_CLASSES)}: name one of them.")
    return _plan(_component_weights(source, component), component, dtype, quantization)


def component_config(source: Path, component: str) -> dict[str, Any]:
    """The config a component is built from: its config.json, or for a single file what its shapes say."""
    return dict(_component_weights(source, component).config)


def keep_fp32_parts(cls: type[nn.Module], dtype: torch.dtype) -> frozenset[str]:
    """The name parts whose parameters stay float32 when `cls` is loaded as `dtype`.

    diffusers keeps them for both 16-bit dtypes; transformers only for float16, whose range is too small
    for UMT5's `wo`, so in bfloat16 that encoder takes half the memory there.
    """
    sixteen_bit = dtype in _SIXTEEN_BIT
    needed = dtype == torch.float16 if issubclass(cls, UMT5EncoderModel) else sixteen_bit
    return frozenset(getattr(cls, "_keep_in_fp32_modules", None) or ()) if needed else frozenset()


def _component_weights(source: Path, component: str) -> ComponentWeights:
    """Config and tensor sources of a component in a pipeline folder, or of a transformer in a single file."""
    if component == "transformer" and not source.is_dir():
        if not source.exists():
            raise CheckpointError(f"{source} does not exist: give a pipeline folder or a .safetensors file.")
        file = recognise_single_file(source)
        return ComponentWeights(source, file.config, file.sources, file.stored, file.spec)
    config = _config(source, component, "WanTransformer3DModel" if component == "transformer" else None)
    if component == "transformer" and (
        config.get("image_dim") is not None or config.get("in_channels", 16) != config.get("out_channels", 16)
    ):
        raise CheckpointError(
            f"{source / 'transformer'} is an image-to-video transformer with {config.get('in_channels')} "
            "input channels: give a text-to-video one."
        )
    tied = getattr(_CLASSES[component], "_tied_weights_keys", None)
    sources = index_tensors(list_component_files(source / component))
    return ComponentWeights(source, config, without_tied(sources, tied if isinstance(tied, Mapping) else {}))


def _plan(
    weights: ComponentWeights, component: str, dtype: torch.dtype, quantization: QuantizationSpec | None
) -> QuantizationPlan:
    keep = keep_fp32_parts(_CLASSES[component], dtype)
    return plan_component(weights, component, PRESETS.get(component), quantization, dtype=dtype, keep_fp32=keep)


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


def _fill(
    module: nn.Module,
    weights: ComponentWeights,
    plan: QuantizationPlan,
    device: torch.device | str,
    dtype: torch.dtype,
    on_tensor: OnTensor | None,
    fused: Mapping[str, tuple[str, slice]] = NO_FUSION,
) -> None:
    """Load `weights` into the empty `module` and put its quantized layers in, as planned."""
    fillings = make_fillings(weights, plan, device=device, dtype=dtype)
    load_weights(
        module,
        weights.sources,
        device=device,
        dtype=dtype,
        keep_fp32=keep_fp32_parts(type(module), dtype),
        fused=fused,
        fillings=fillings,
        stored=weights.stored,
        on_tensor=on_tensor,
    )
    with torch.inference_mode(False), torch.no_grad():
        for name in plan.quantized_names:
            filling = fillings.pop(f"{name}.weight")
            linear = module.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            replace_layer(module, name, filling.finish(linear))


@contextmanager
def _empty_weights() -> Iterator[None]:
    """Build on the meta device, buffers computed, global random state untouched, tensors ordinary ones."""
    with (
        torch.random.fork_rng(devices=[]),
        torch.inference_mode(False),
        torch.no_grad(),
        init_empty_weights(include_buffers=False),
    ):
        yield


def _frozen(module: ModuleT) -> ModuleT:
    module.eval()
    module.requires_grad_(False)
    return module
