"""How much device memory a recipe and settings need, before anything is loaded."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..checkpoints.component import Component
from ..families.kv_policies import KEEP_KEYS
from ..families.model_family import AttentionChoice, ModelFamily
from ..memory.byte_text import format_gb
from ..memory.cleanup import CleanupPolicy
from ..ops.fp8_linear import supports_fp8_matmul
from ..ops.quantization import QuantizationSpec
from .layer_plan import least_bytes
from .recipe import COMPILE_NOTHING, Recipe
from .settings import StreamSettings

# Memory besides tensors: kernel workspaces (cuBLAS and cuDNN), and what the allocator cannot use.
DEVICE_OVERHEAD = 512 * 1024**2
# What to choose where no estimate says what would fit.
SMALLER = "a smaller width or height or fewer context frames"


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of a stream on its device.

    Attributes:
        transformer: weights, in their format.
        vae: weights, with those of a decoder in its place: the VAE encodes then.
        text_encoder: weights, in their format.
        text_encoding: activations of the text encoder.
        streaming: caches and activations of the stream at their largest.
        overhead: memory besides tensors.
        transformer_least: of `transformer`, what is on the device when all of its layers are streamed.
        text_encoder_least: the same of `text_encoder`.
    """

    transformer: int
    vae: int
    text_encoder: int
    text_encoding: int
    streaming: int
    overhead: int = 0
    transformer_least: int = 0
    text_encoder_least: int = 0

    @property
    def needed(self) -> int:
        """What it takes with all layers on the device: the text encoder is offloaded before the rest is loaded."""
        streaming = self.transformer + self.vae + self.streaming
        return max(streaming, self.text_encoder + self.text_encoding) + self.overhead

    @property
    def least(self) -> int:
        """The least that works: with all layers streamed."""
        streaming = self.transformer_least + self.vae + self.streaming
        return max(streaming, self.text_encoder_least + self.text_encoding) + self.overhead

    def without_streaming(self) -> MemoryEstimate:
        """The same where layers cannot be streamed."""
        return replace(self, transformer_least=self.transformer, text_encoder_least=self.text_encoder)

    def left_for(self, component: str, available: int) -> int:
        """Bytes that are left for the weights of "transformer" or "text_encoder" when it is at work."""
        rest = self.text_encoding if component == "text_encoder" else self.vae + self.streaming
        return available - rest - self.overhead


def estimate_memory(
    family: ModelFamily,
    components: Mapping[str, Component],
    settings: StreamSettings,
    attention: AttentionChoice,
    device: torch.device,
) -> MemoryEstimate:
    """Estimate from headers and configs, and a rehearsal on the meta device; a second or two at 14B.

    Args:
        family: of the model.
        components: transformer, VAE and perhaps text encoder and decoder, in the formats they will be loaded in.
        settings: of the stream.
        attention: how it is computed.
        device: decides whether weights are dequantized for each layer.

    Raises:
        CheckpointError: a component cannot be loaded.
    """
    transformer, vae, decoder = components["transformer"], components["vae"], components.get("decoder")
    text_encoder = None if settings.embeds_given else components.get("text_encoder")
    text_encoding = 0
    if text_encoder is not None:
        text_encoding = family.text_encoding_bytes(text_encoder) + _dequantized_bytes(text_encoder, device)
    streaming = family.streaming_bytes(components, _rehearsal_inputs(settings), attention)
    return MemoryEstimate(
        transformer=transformer.bytes,
        vae=vae.bytes + (decoder.bytes if decoder is not None else 0),
        text_encoder=0 if text_encoder is None else text_encoder.bytes,
        text_encoding=text_encoding,
        streaming=streaming + _dequantized_bytes(transformer, device),
        overhead=0 if device.type == "cpu" else DEVICE_OVERHEAD,
        transformer_least=least_bytes(transformer.bytes, transformer.layer_bytes),
        text_encoder_least=0 if text_encoder is None else least_bytes(text_encoder.bytes, text_encoder.layer_bytes),
    )


def of_their_sizes(settings: StreamSettings) -> StreamSettings:
    """The same for all settings of these sizes, so that they share a rehearsal: nearly every run has a new seed."""
    return replace(
        settings,
        seed=0,
        blocks=1,
        steps=min(settings.steps, 2),
        timesteps=None,
        first_block_timesteps=None,
        on_prompt_change=KEEP_KEYS,
        cleanup=CleanupPolicy.NEVER,
        reset_compile=False,
        memory_gb=0.0,
        start_given=False,
    )


def requantized(components: Mapping[str, Component], spec: QuantizationSpec | None) -> dict[str, Component]:
    """The components with another quantization."""
    return {name: replace(component, quantization=spec) for name, component in components.items()}


def check_it_fits(
    estimate: MemoryEstimate, available: int, settings: StreamSettings, others: Iterator[tuple[str, MemoryEstimate]]
) -> None:
    """Raise unless the stream fits.

    Args:
        estimate: of the requested stream.
        available: bytes the device can give.
        settings: for the message.
        others: descriptions and estimates of alternatives, best first.

    Raises:
        MemoryError: with the figures, and the first of `others` that fits.
    """
    if estimate.least <= available:
        return
    fits = (f"{text} needs {format_gb(other.least)}" for text, other in others if other.least <= available)
    fitting = next(fits, None)
    advice = fitting or "nothing smaller fits either; choose a smaller width and height or another device"
    streamed = ", its layers streamed from RAM" if estimate.least < estimate.needed else ""
    raise MemoryError(
        f"this model at {settings.width}x{settings.height} needs at least {format_gb(estimate.least)}{streamed} "
        f"(weights {format_gb(estimate.transformer_least + estimate.vae)}, caches and activations "
        f"{format_gb(estimate.streaming)}), {format_gb(available)} are free: {advice}."
    )


def choice_that_fits(others: Iterator[tuple[str, MemoryEstimate]], available: int) -> str:
    """The first of descriptions and estimates that fits, as a clause; empty where none does."""
    fits = (f"{text}, which needs {format_gb(other.least)}" for text, other in others if other.least <= available)
    return next(fits, "")


def smaller_choices(
    spec: QuantizationSpec | None, settings: StreamSettings, *, can_quantize: bool, size_step: int
) -> Iterator[tuple[str, QuantizationSpec | None, StreamSettings]]:
    """What to choose instead, mildest change first: FP8, then fewer context frames, then a smaller picture.

    Args:
        spec: the requested quantization.
        settings: of the stream.
        can_quantize: whether the weights can be quantized; False for a checkpoint that is already quantized.
        size_step: of width and height.

    Yields:
        A description, and quantization and settings to choose.
    """
    formats = ""
    if can_quantize:
        if spec is None:
            spec = QuantizationSpec("fp8")
            yield "FP8", spec, settings
        formats = f"{spec.format.upper()} "
    for context in range(settings.context_frames - 1, 0, -1):
        smaller = replace(settings, context_frames=context, sink_frames=min(settings.sink_frames, context))
        yield f"{formats}with {context} context frames".strip(), spec, smaller
    width, height = (max(size_step, side // (2 * size_step) * size_step) for side in (settings.width, settings.height))
    yield f"{formats}at {width}x{height}".strip(), spec, replace(settings, width=width, height=height)


def _rehearsal_inputs(settings: StreamSettings) -> dict[str, Any]:
    few_steps = replace(settings, steps=min(settings.steps, 2), timesteps=None, first_block_timesteps=None)
    few_draws = {"generator": torch.Generator().manual_seed(0)}
    return few_steps.pipeline_inputs() | few_draws | {"video_given": settings.video_given}


def _dequantized_bytes(component: Component, device: torch.device) -> int:
    """Bytes of the largest weight dequantized for a forward, if the device cannot multiply quantized weights."""
    spec = component.plan.spec
    if spec is None or (spec.format == "fp8" and spec.activations != "none" and supports_fp8_matmul(device)):
        return 0
    sizes = [torch.Size(layer.shape).numel() for layer in component.plan.layers if layer.quantized]
    return max(sizes, default=0) * component.dtype.itemsize


def attention_choice(recipe: Recipe, device: torch.device) -> AttentionChoice:
    """How attention is computed under a recipe on `device`."""
    return AttentionChoice(recipe.attention_backend, compiled=recipe.compile != COMPILE_NOTHING, device=device)
