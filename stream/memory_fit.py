"""What a stream's memory comes to on its device, and the plan that fits it there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch

from ..families.kv_policies import KV_AUTO, KV_INT8, KV_PLAIN
from ..families.model_family import ModelFamily
from ..ops.quantization import QuantizationSpec
from .built_in_saving import BuiltInSaving
from .component_store import ComponentStore
from .decode_bounds import bound_decoding, decoder_ram_bytes
from .estimate import (
    SMALLER,
    MemoryEstimate,
    attention_choice,
    check_it_fits,
    choice_that_fits,
    estimate_memory,
    of_their_sizes,
    requantized,
    smaller_choices,
)
from .recipe import Recipe
from .residency import Residency
from .settings import StreamSettings
from .streaming_forecast import Pace
from .streaming_plans import StreamingPlans


class MemoryFit:
    """Estimates of a built-in pipeline's streams, from headers and shapes, and how they are made to fit.

    Args:
        recipe: of the pipeline.
        family: of the model.
        store: of its components.
        plans: which layers stay on the device.
        saving: what is done where memory is short.
        residency: says what is free.
        device: where it computes.
    """

    def __init__(
        self,
        recipe: Recipe,
        *,
        family: ModelFamily,
        store: ComponentStore,
        plans: StreamingPlans,
        saving: BuiltInSaving,
        residency: Residency,
        device: torch.device,
    ) -> None:
        self._recipe = recipe
        self._family = family
        self._store = store
        self._plans = plans
        self._saving = saving
        self._residency = residency
        self._device = device
        self._estimates: dict[tuple[QuantizationSpec | None, StreamSettings], MemoryEstimate] = {}

    def change_recipe(self, recipe: Recipe) -> None:
        """Estimate anew: the pipeline's components are others."""
        self._estimates.clear()
        self._recipe = recipe

    def plan(self, settings: StreamSettings) -> StreamSettings:
        """Plan which layers stay on the device; returns the settings with what was left to the memory.

        Where so many layers would be streamed that the bus sets the pace, keys in 8 bits leave room for more of them,
        and a first step that takes the context, or the block before, along needs one pass less over these.
        """
        available = self._available_bytes(settings)
        spec = self._recipe.quantization
        packs = settings.kv_format == KV_AUTO
        settings = replace(settings, kv_format=KV_PLAIN) if packs else settings
        self._saving.begin(may_pack_keys=packs)
        if available is None:
            return settings
        band_counts = self._family.decode_bands(self._store.components)
        if not self._plans.would_stay(self.estimate(spec, settings), available):
            settings = replace(settings, kv_format=KV_INT8) if packs else settings
            settings = bound_decoding(
                settings,
                available,
                lambda changed: self.estimate(spec, changed).least,
                band_counts,
                has_ram=self._residency.streams_layers(self._device),
            )
            fused = replace(settings, fuse_context=True)
            # The fused pass has the activations of both.
            settings = fused if self.estimate(spec, fused).least <= available else settings
        estimate = self.estimate(spec, settings)
        check_it_fits(estimate, available, settings, self._smaller_choices(settings))
        self._saving.fit(settings, estimate, available)
        self._store.budget = available - estimate.overhead if settings.memory_gb else None
        pictures = self._family.geometry.pixel_frames(settings.frames_per_block, from_the_start=False)
        pace = Pace(settings.passes_per_block, pictures, savings=settings.savings)
        in_ram = decoder_ram_bytes(settings, lambda changed: self.estimate(spec, changed).streaming, band_counts)
        self._plans.make(estimate, available, pace, with_text_encoder=not settings.embeds_given, reserved=in_ram)
        return settings

    def what_would_fit(self, settings: StreamSettings) -> str:
        """The mildest of `smaller_choices` that takes less than `settings` and fits what is free now."""
        spec, free = self._recipe.quantization, self._residency.available_bytes(self._device)
        most = self.estimate(spec, settings).least - 1
        return choice_that_fits(self._smaller_choices(settings), most if free is None else min(most, free)) or SMALLER

    def estimate(self, spec: QuantizationSpec | None, settings: StreamSettings) -> MemoryEstimate:
        """The memory of a stream whose linear layers are quantized as `spec` says; kept, as it takes a second or so."""
        settings = of_their_sizes(settings)
        key = (spec, settings)
        if key not in self._estimates:
            components = self._store.components
            if spec != self._recipe.quantization:
                components = requantized(components, spec)
            attention = attention_choice(self._recipe, self._device)
            estimate = estimate_memory(self._family, components, settings, attention, self._device)
            if not self._residency.streams_layers(self._device):
                estimate = estimate.without_streaming()
            self._estimates[key] = estimate
        return self._estimates[key]

    def _smaller_choices(self, settings: StreamSettings) -> Iterator[tuple[str, MemoryEstimate]]:
        can_quantize = not self._store.components["transformer"].is_stored_quantized
        step = self._family.geometry.size_step
        choices = smaller_choices(self._recipe.quantization, settings, can_quantize=can_quantize, size_step=step)
        return ((text, self.estimate(spec, changed)) for text, spec, changed in choices)

    def _available_bytes(self, settings: StreamSettings) -> int | None:
        free = self._residency.available_bytes(self._device)
        if not settings.memory_gb:
            return free
        if free is None or not self._residency.streams_layers(self._device):
            raise ValueError(
                f"memory_gb is {settings.memory_gb:g} and the device is {self._device}, whose memory is not managed: "
                "leave it at 0."
            )
        return min(free, int(settings.memory_gb * 1e9))
