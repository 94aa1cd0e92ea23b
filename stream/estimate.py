"""What a recipe and settings will need of the device, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.transformer_wan import WanTransformer3DModel

from ..memory.peak_meter import PeakMeter
from ..ops.fp8_linear import supports_fp8_matmul
from ..ops.quantization import QuantizationPlan, QuantizationSpec
from ..wan.checkpoints.components import component_config, keep_fp32_parts, plan_for
from ..wan.rehearsal import MetaRehearsal
from ..wan.steps.text_step import DEFAULT_TEXT_TOKENS
from ..wan.working_memory import cross_cache_bytes, kv_cache_bytes
from .recipe import Recipe
from .settings import StreamSettings

# Measured with `PeakMeter` on UMT5 (transformers 5.23): bias, scores, float32 softmax and its cast, per score.
_BYTES_PER_TEXT_SCORE = 18
_REHEARSED_LAYERS = 2
# What kernels take beside tensors (cuBLAS and cuDNN workspaces) and what the allocator cannot use.
DEVICE_OVERHEAD = 512 * 1024**2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a stream on its device.

    Attributes:
        transformer: weights, in their format.
        vae: weights.
        text_encoder: weights, in their format.
        text_encoding: activations of the text encoder.
        streaming: caches and activations of the stream at their largest.
        overhead: what no tensor accounts for.
    """

    transformer: int
    vae: int
    text_encoder: int
    text_encoding: int
    streaming: int
    overhead: int = 0

    @property
    def everything_resident(self) -> int:
        """With the text encoder staying on the device."""
        weights = self.transformer + self.vae + self.text_encoder
        return weights + max(self.streaming, self.text_encoding) + self.overhead

    @property
    def needed(self) -> int:
        """With the text encoder leaving before the rest comes: the least that works."""
        streaming = self.transformer + self.vae + self.streaming
        return max(streaming, self.text_encoder + self.text_encoding) + self.overhead


def estimate_memory(
    recipe: Recipe,
    settings: StreamSettings,
    *,
    model: Path,
    components: Path,
    device: torch.device,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> MemoryEstimate:
    """Estimate from headers and configs, and a rehearsal on the meta device; a second or two at 14B.

    Args:
        recipe: gives the quantization.
        settings: of the stream.
        model: folder or file of the transformer.
        components: folder of VAE and text encoder.
        device: whose kernels decide whether weights are dequantized for each layer.
        dtype: of the transformer and text encoder.
        vae_dtype: of the VAE.

    Raises:
        CheckpointError: a component cannot be loaded.
    """
    plan = plan_for(model, "transformer", dtype, recipe.quantization)
    text_plan = plan_for(components, "text_encoder", dtype, recipe.quantization)
    text_config = component_config(components, "text_encoder")
    streaming = _streaming_bytes(
        component_config(model, "transformer"), component_config(components, "vae"), settings, dtype, vae_dtype
    )
    return MemoryEstimate(
        transformer=plan.bytes_after,
        vae=plan_for(components, "vae", vae_dtype, None).bytes_after,
        text_encoder=text_plan.bytes_after,
        text_encoding=_text_encoding_bytes(text_config, dtype) + _dequantized_bytes(text_plan, device, dtype),
        streaming=streaming + _dequantized_bytes(plan, device, dtype),
        overhead=0 if device.type == "cpu" else DEVICE_OVERHEAD,
    )


def check_it_fits(
    estimate: MemoryEstimate, available: int, settings: StreamSettings, others: Iterator[tuple[str, MemoryEstimate]]
) -> None:
    """Raise unless the stream fits.

    Args:
        estimate: of what was asked for.
        available: bytes the device can give.
        settings: for the message.
        others: descriptions and estimates of what else could be chosen, best first.

    Raises:
        MemoryError: with the figures, and the first of `others` that fits.
    """
    if estimate.needed <= available:
        return
    fitting = next((f"{text} needs {_gb(other.needed)}" for text, other in others if other.needed <= available), None)
    advice = fitting or "nothing smaller fits either; choose a smaller width and height or another device"
    raise MemoryError(
        f"this model at {settings.width}x{settings.height} needs {_gb(estimate.needed)} (weights "
        f"{_gb(estimate.transformer + estimate.vae)}, caches and activations {_gb(estimate.streaming)}), "
        f"{_gb(available)} are free: {advice}."
    )


def smaller_choices(recipe: Recipe, settings: StreamSettings) -> Iterator[tuple[str, Recipe, StreamSettings]]:
    """What to choose instead, mildest change first: FP8, then fewer context frames, then a smaller picture."""
    if recipe.quantization is None:
        recipe = replace(recipe, quantization=QuantizationSpec("fp8"))
        yield "FP8", recipe, settings
    name = (recipe.quantization or QuantizationSpec("fp8")).format.upper()
    for context in range(settings.context_frames - 1, 0, -1):
        smaller = replace(settings, context_frames=context, sink_frames=min(settings.sink_frames, context))
        yield f"{name} with {context} context frames", recipe, smaller
    width, height = (max(16, side // 32 * 16) for side in (settings.width, settings.height))
    yield f"{name} at {width}x{height}", recipe, replace(settings, width=width, height=height)


def _streaming_bytes(
    transformer_config: dict[str, Any],
    vae_config: dict[str, Any],
    settings: StreamSettings,
    dtype: torch.dtype,
    vae_dtype: torch.dtype,
) -> int:
    """Peak of a rehearsal with a few layers, plus the caches of the others: activations are the same in each."""
    layers = transformer_config["num_layers"]
    rehearsed = min(layers, _REHEARSED_LAYERS)
    rehearsal = MetaRehearsal(
        transformer_config | {"num_layers": rehearsed},
        vae_config,
        dtype=dtype,
        vae_dtype=vae_dtype,
        kept_fp32=keep_fp32_parts(WanTransformer3DModel, dtype),
    )
    with PeakMeter(meta=True) as meter:
        rehearsal.run(_rehearsal_inputs(settings))
    others = transformer_config | {"num_layers": layers - rehearsed}
    scale = vae_config["scale_factor_spatial"]
    _, patch_height, patch_width = transformer_config["patch_size"]
    per_frame = (settings.height // scale // patch_height) * (settings.width // scale // patch_width)
    frames = settings.context_frames + settings.frames_per_block
    return (
        meter.peak_bytes
        + kv_cache_bytes(others, frames=frames, tokens_per_frame=per_frame, dtype=dtype)
        + cross_cache_bytes(others, text_tokens=DEFAULT_TEXT_TOKENS, dtype=dtype)
    )


def _rehearsal_inputs(settings: StreamSettings) -> dict[str, Any]:
    few_steps = replace(settings, steps=min(settings.steps, 2))
    return few_steps.pipeline_inputs() | {"generator": torch.Generator().manual_seed(0)}


def _dequantized_bytes(plan: QuantizationPlan, device: torch.device, dtype: torch.dtype) -> int:
    """The largest weight made whole for one forward, where the device does not multiply quantized ones."""
    spec = plan.spec
    if spec is None or (spec.format == "fp8" and spec.activations != "none" and supports_fp8_matmul(device)):
        return 0
    sizes = [torch.Size(layer.shape).numel() for layer in plan.layers if layer.quantized]
    return max(sizes, default=0) * dtype.itemsize


def _text_encoding_bytes(config: dict[str, Any], dtype: torch.dtype) -> int:
    scores = config["num_heads"] * DEFAULT_TEXT_TOKENS**2
    hidden = DEFAULT_TEXT_TOKENS * (4 * config["d_model"] + 3 * config["d_ff"])
    return _BYTES_PER_TEXT_SCORE * scores + hidden * dtype.itemsize


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB"
