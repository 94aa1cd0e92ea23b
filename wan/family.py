"""The causal models of Wan: those of 2.1 (Krea Realtime 14B, Self-Forcing and its relatives), and of 2.2's 5B."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..families.model_family import (
    AttentionChoice,
    ComponentOptions,
    LatentGeometry,
    ModelFamily,
    ModelSources,
)
from ..families.stream_preset import StreamPreset
from .checkpoints.transformer_configs import TRANSFORMER_CLASSES, diffusers_config
from .geometry import WAN_21_GEOMETRY, WAN_22_GEOMETRY
from .memory_facts import MEMORY_FACTS
from .presets import UNNAMED, WAN_21_PRESETS, WAN_22_PRESETS

if TYPE_CHECKING:
    import torch
    from diffusers.modular_pipelines import ModularPipeline

    from ..checkpoints.component import Component
    from ..checkpoints.lora_choice import LoraChoice
    from ..checkpoints.tensor_writing import PlannedFile
    from ..ops.call_graphs import CallGraphs

# diffusers takes seconds to import, so the methods import it: nodes read this class when ComfyUI starts.

# Of a config that does not say: diffusers' class has 2.1's as its default.
_UNWRITTEN_CHANNELS = WAN_21_GEOMETRY.channels


@dataclass(frozen=True)
class CausalWan(ModelFamily):
    """Text to video in blocks of latent frames: one transformer class and one VAE class, in several sizes.

    Attributes:
        name: shown to users.
        geometry: of its latents, by whose channels its files are recognised.
        presets: of its models.
    """

    transformer_classes = TRANSFORMER_CLASSES
    vae_class = "AutoencoderKLWan"
    memory_facts = MEMORY_FACTS

    name: str
    geometry: LatentGeometry
    presets: tuple[StreamPreset, ...]

    def recognises(self, model: Path) -> bool:
        """Checks the class in a folder's config, or names and shapes in a single file."""
        from ..checkpoints.json_text import read_json
        from .checkpoints.single_file import holds_transformer

        if not model.is_dir():
            return holds_transformer(model, self.geometry.channels)
        config = model / "transformer" / "config.json"
        if not config.exists():
            return False
        facts = diffusers_config(config, read_json(config))
        channels = facts.get("in_channels", _UNWRITTEN_CHANNELS)
        return facts.get("_class_name") in self.transformer_classes and channels == self.geometry.channels

    def components(self, sources: ModelSources, options: ComponentOptions) -> dict[str, Component]:
        """See `ModelFamily`; transformer and VAE are prepared for streaming when they are loaded."""
        from .checkpoints.components import (
            check_parts_go_together,
            decoder_component,
            text_encoder_component,
            transformer_component,
            vae_component,
        )
        from .transformer.compiled_blocks import compile_transformer_blocks
        from .transformer.installed_attention import install_causal_attention
        from .vae.gpu_layout import speed_up_decoder, speed_up_vae

        def prepare_transformer(transformer: Any) -> None:  # noqa: ANN401
            install_causal_attention(transformer, options.attention.backend)
            if options.attention.compiled:
                compile_transformer_blocks(transformer)

        quantization = options.quantization
        components = {
            "transformer": transformer_component(
                sources.transformer,
                dtype=options.dtype,
                quantization=quantization,
                loras=options.loras,
                averaged=options.averaged,
                prepare=prepare_transformer,
            ),
            "vae": vae_component(sources.vae, dtype=options.vae_dtype, prepare=speed_up_vae),
        }
        if sources.text_encoder is not None:
            components["text_encoder"] = text_encoder_component(
                sources.text_encoder, dtype=options.dtype, quantization=quantization
            )
        if sources.decoder is not None:
            components["decoder"] = decoder_component(
                sources.decoder, dtype=options.vae_dtype, prepare=speed_up_decoder
            )
        check_parts_go_together(components)
        return components

    def with_loras(self, transformer: Component, loras: tuple[LoraChoice, ...]) -> Component:
        """See `ModelFamily`."""
        from .checkpoints.components import with_loras

        return with_loras(transformer, loras)

    def load_tokenizer(self, sources: ModelSources) -> Any:  # noqa: ANN401
        """UMT5's, from a folder or from inside the text encoder's file."""
        from .checkpoints.tokenizer import find_tokenizer

        return find_tokenizer(sources.tokenizers)

    def parts_in(self, file: Path) -> frozenset[str]:
        """See `ModelFamily`."""
        from .checkpoints.all_in_one import parts_in

        return parts_in(file)

    def notices(self, transformer: Component) -> tuple[str, ...]:
        """See `causality_notice`."""
        from .checkpoints.causality import causality_notice

        notice = causality_notice(transformer.weights)
        return () if notice is None else (notice,)

    def text_shape(self, transformer: Component) -> tuple[int, int]:
        """As many tokens as prompts are padded to, and the width of UMT5's output."""
        from .steps.text_step import DEFAULT_TEXT_TOKENS

        return DEFAULT_TEXT_TOKENS, transformer.config["text_dim"]

    def choose_preset(self, transformer: Component) -> StreamPreset:
        """By the name and size of the checkpoint, then by its config and its `streaming.json`."""
        from .checkpoints.preset_choice import choose_preset

        return choose_preset(self.presets, UNNAMED, transformer.weights)

    def make_pipeline(self) -> ModularPipeline:
        """See `ModelFamily`."""
        from .steps.causal_wan_blocks import make_causal_wan_pipeline

        return make_causal_wan_pipeline()

    def pack_keys(self, kv_cache: Any, inputs: Mapping[str, Any]) -> Any:  # noqa: ANN401
        """See `ModelFamily`."""
        from .steps.context_policies import find_packing
        from .transformer.packed_kv_cache import PackedKVCache

        context, block = inputs["context_frames"], inputs["num_frames_per_block"]
        packing = find_packing(inputs["kv_policy"], inputs["kv_format"], context, block)
        return kv_cache if packing is None else PackedKVCache.take_over(kv_cache, packing)

    def snapshot_kinds(self) -> Mapping[str, Callable[[Mapping[str, Any], torch.device], Any]]:
        """KV caches with a deferred block, and the caches of the VAE's decoder and encoder."""
        from .transformer.head_scaled_kv_cache import HeadScaledKVCache
        from .transformer.kv_cache import DeferredBlock, KVCache
        from .transformer.packed_kv_cache import PackedKVCache
        from .vae.streaming_vae import DecoderCache, EncoderCache
        from .vae.tiny_stream import TinyDecoderCache
        from .vae.video_encoder import VideoEncoder

        of_vae = (DecoderCache, TinyDecoderCache, EncoderCache, VideoEncoder)
        kinds = (KVCache, PackedKVCache, HeadScaledKVCache, DeferredBlock, *of_vae)
        return {kind.__name__: kind.from_snapshot for kind in kinds}

    def decoder_reach(self, pipe: ModularPipeline) -> int:
        """See `StreamDecoder`."""
        from .vae.stream_decoder import StreamDecoder

        return StreamDecoder.of(pipe).reach

    def decode_again(self, pipe: ModularPipeline, latents: torch.Tensor, inputs: Mapping[str, Any]) -> dict[str, Any]:
        """The decoder's cache."""
        from .vae.banded_decoder import DecodeBounds
        from .vae.stream_decoder import StreamDecoder

        bounds = DecodeBounds(inputs["decode_bands"], inputs["decoder_cache_in_ram"])
        return {"decoder_cache": StreamDecoder.of(pipe).decode_again(latents, bounds)}

    def start_from_pictures(self, pipe: ModularPipeline, pictures: Any, inputs: Mapping[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        """See `entries_of_pictures`."""
        from .steps.start_entries import entries_of_pictures
        from .vae.banded_decoder import DecodeBounds
        from .vae.stream_decoder import StreamDecoder

        return entries_of_pictures(
            StreamDecoder.of(pipe),
            pictures,
            context_frames=inputs["context_frames"],
            sink_frames=inputs["sink_frames"],
            video_follows=inputs["video_given"],
            bounds=DecodeBounds(inputs["decode_bands"], inputs["decoder_cache_in_ram"]),
        )

    def streaming_bytes(
        self, components: Mapping[str, Component], inputs: Mapping[str, Any], attention: AttentionChoice
    ) -> int:
        """Measured by a rehearsal of the real blocks on the meta device."""
        from .rehearsal import rehearse_streaming_bytes

        parts = components["transformer"], components["vae"]
        return rehearse_streaming_bytes(*parts, self.geometry, inputs, attention, components.get("decoder"))

    def decode_bands(self, components: Mapping[str, Component]) -> tuple[int, ...]:
        """See `ModelFamily`; Wan 2.2's decoder and tiny ones work on whole pictures only."""
        from .vae.banded_decoder import BAND_COUNTS, can_split

        return BAND_COUNTS if can_split(components.get("decoder", components["vae"]).config) else (1,)

    def text_encoding_bytes(self, text_encoder: Component) -> int:
        """See `text_encoding_bytes`."""
        from .rehearsal import text_encoding_bytes

        return text_encoding_bytes(text_encoder)

    def save_quantized(self, transformer: Any, path: Path, on_tensor: Callable[[str, int], None]) -> None:  # noqa: ANN401
        """In ComfyUI's own format."""
        from .checkpoints.quantized_checkpoint import save_quantized_transformer

        save_quantized_transformer(transformer, path, on_tensor=on_tensor)

    def plan_plain_checkpoint(self, model: Path, *, averaged: bool = True) -> PlannedFile:
        """With Wan's own names."""
        from .checkpoints.plain_checkpoint import plan_plain_checkpoint

        return plan_plain_checkpoint(model, averaged=averaged)

    def held_masks(self, transformer: object) -> Mapping[str, object]:
        """Block masks of flex attention."""
        from .transformer.installed_attention import block_masks_of

        return block_masks_of(transformer)

    def repeat_calls(self, pipe: ModularPipeline, graphs: CallGraphs) -> None:
        """Passes of the transformer, and the picture that is encoded for its context."""
        from .transformer.installed_attention import causal_attention_of

        causal_attention_of(pipe.transformer).graphs = graphs

    def report_kernels(
        self, pipe: ModularPipeline, components: Mapping[str, Component], device: torch.device
    ) -> dict[str, str]:
        """See `ModelFamily`."""
        from .kernel_report import report_kernels
        from .vae.residual_blocks import takes_fused_passes

        transformer, vae = components["transformer"], components["vae"]
        decoding = components.get("decoder", vae)
        return report_kernels(
            pipe,
            device,
            dtype=transformer.dtype,
            vae_dtype=vae.dtype,
            fused_vae=takes_fused_passes(decoding.config),
        )


CAUSAL_WAN_21 = CausalWan(name="causal Wan 2.1", geometry=WAN_21_GEOMETRY, presets=WAN_21_PRESETS)
CAUSAL_WAN_22_5B = CausalWan(name="causal Wan 2.2 5B", geometry=WAN_22_GEOMETRY, presets=WAN_22_PRESETS)
