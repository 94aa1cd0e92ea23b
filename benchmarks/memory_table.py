"""Where a stream's memory goes at 14B and 1.3B, by resolution, context and format, as Markdown; runs anywhere.

    python benchmarks/memory_table.py [--sizes 14B,1.3B] [--resolutions 832x480] [--contexts 3,6] [--formats bf16,fp8]

Weights and the sum come from `stream/estimate.py`, given a checkpoint of headers (sparse files: they take no
disk). The caches are computed here by formula, and the program stops if a cache it allocates on shapes alone has
another size.
"""

from __future__ import annotations

import argparse
import itertools
import json
import struct
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import streamblocks_path  # noqa: F401
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from diffusers.utils import logging as diffusers_logging
from full_size_models import META, SIZES, ModelSize
from torch import nn
from transformers import UMT5Config, UMT5EncoderModel

from streamblocks.families.model_family import AttentionChoice, ComponentOptions, ModelSources
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.estimate import DEVICE_OVERHEAD, MemoryEstimate, estimate_memory
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.family import CAUSAL_WAN_21
from streamblocks.wan.transformer.causal_transformer import allocate_cross_cache, allocate_kv_cache
from streamblocks.wan.vae.streaming_vae import DecoderCache, decode_latent_frame

SPECS = {"bf16": None, "fp8": QuantizationSpec("fp8"), "int8": QuantizationSpec("int8")}
GIB = 1 << 30
TEXT_TOKENS = 512
# Of the VAE: pixels of a latent, and of a patch.
_LATENT, _PATCH = 8, 16
_SHARD_BYTES = 2 * GIB
_COLUMNS = (
    "size", "format", "resolution", "context", "transformer", "VAE", "KV cache", "cross cache", "decoder cache",
    "activations", "overhead", "needed",
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line, in bytes."""

    size: str
    format: str
    resolution: str
    context: int
    transformer: int
    vae: int
    kv_cache: int
    cross_cache: int
    decoder_cache: int
    activations: int
    overhead: int

    @property
    def needed(self) -> int:
        """While it streams: all of it."""
        caches = self.kv_cache + self.cross_cache + self.decoder_cache
        return self.transformer + self.vae + caches + self.activations + self.overhead

    def cells(self) -> tuple[str, ...]:
        """The line as text, GiB."""
        sizes = (
            self.transformer, self.vae, self.kv_cache, self.cross_cache, self.decoder_cache, self.activations,
            self.overhead, self.needed,
        )  # fmt: skip
        return (
            self.size,
            self.format,
            self.resolution,
            str(self.context),
            *(f"{size / GIB:.2f}" for size in sizes),
        )


class HeaderCheckpoint:
    """A pipeline folder whose safetensors files have headers and no data."""

    def __init__(self, folder: Path, size: ModelSize) -> None:
        self.folder = folder
        self.size = size
        with META:
            transformer = WanTransformer3DModel(**size.transformer)
            vae = AutoencoderKLWan(**size.vae)
            encoder = UMT5EncoderModel(UMT5Config(**size.text))
        for name, model in (("transformer", transformer), ("vae", vae), ("text_encoder", encoder)):
            (folder / name).mkdir(parents=True)
            config = model.config if name == "text_encoder" else model
            (config.save_pretrained if name == "text_encoder" else config.save_config)(folder / name)
            stem = "model" if name == "text_encoder" else "diffusion_pytorch_model"
            write_headers(folder / name, stem, model)

    def estimate(self, settings: StreamSettings, spec: QuantizationSpec | None) -> MemoryEstimate:
        """Of a card with FP8 units: the estimate is asked for the CPU, where each layer is dequantized for its use."""
        attention = AttentionChoice()
        options = ComponentOptions(torch.bfloat16, torch.float16, spec, attention)
        components = CAUSAL_WAN_21.components(ModelSources.in_folder(self.folder), options)
        return estimate_memory(CAUSAL_WAN_21, components, settings, attention, torch.device("cpu"))

    def dequantized(self, spec: QuantizationSpec | None) -> int:
        """Bytes that the estimate counts for that: the largest quantized layer in bfloat16."""
        plan = transformer_component(self.folder, dtype=torch.bfloat16, quantization=spec).plan
        return 2 * max((torch.Size(layer.shape).numel() for layer in plan.layers if layer.quantized), default=0)


def write_headers(folder: Path, stem: str, model: nn.Module) -> None:
    """Safetensors files of `model`'s parameters, each once, in bfloat16, at full length but sparse.

    Split, because a small machine cannot map 28 GB at once, not even to read a header.
    """
    shards: list[list[tuple[str, nn.Parameter]]] = [[]]
    filled = 0
    for name, parameter in model.named_parameters():
        if filled > _SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append((name, parameter))
        filled += 2 * parameter.numel()
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = folder / f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        write_header(file, shard)
        weight_map |= {name: file.name for name, _ in shard}
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def write_header(file: Path, parameters: list[tuple[str, nn.Parameter]]) -> None:
    """One safetensors file, sparse after its header."""
    header, offset = {}, 0
    for name, parameter in parameters:
        end = offset + 2 * parameter.numel()
        header[name] = {"dtype": "BF16", "shape": list(parameter.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
        out.truncate(8 + len(text) + offset)


def kv_cache_bytes(size: ModelSize, settings: StreamSettings) -> int:
    """2 (keys, values) x layers x latent frames x tokens x dim x 2 bytes."""
    frames = settings.context_frames + settings.frames_per_block
    tokens = (settings.height // _PATCH) * (settings.width // _PATCH)
    return 2 * _layers_by_dim(size) * frames * tokens * 2


def cross_cache_bytes(size: ModelSize) -> int:
    """2 (keys, values) x layers x text tokens x dim x 2 bytes."""
    return 2 * _layers_by_dim(size) * TEXT_TOKENS * 2


def decoder_cache_bytes(size: ModelSize, settings: StreamSettings) -> int:
    """Of a decoder run on shapes alone until its cache is full."""
    with META:
        vae = AutoencoderKLWan(**size.vae).to(torch.float16)
    cache = DecoderCache.for_vae(vae)
    shape = (1, 16, 1, settings.height // _LATENT, settings.width // _LATENT)
    for _ in range(3):
        decode_latent_frame(vae, torch.empty(shape, device=META), cache)
    features = [feature for feature in cache.features if isinstance(feature, torch.Tensor)]
    return sum(feature.numel() * feature.element_size() for feature in features)


def check_formulas(size: ModelSize, settings: StreamSettings) -> None:
    """Stop unless the caches that the pipeline allocates have the computed bytes."""
    with META:
        transformer = WanTransformer3DModel(**size.transformer)
    transformer.patch_embedding.weight.data = transformer.patch_embedding.weight.data.bfloat16()
    own = allocate_kv_cache(
        transformer,
        frames=settings.context_frames + settings.frames_per_block,
        latent_height=settings.height // _LATENT,
        latent_width=settings.width // _LATENT,
    )
    text = allocate_cross_cache(transformer, text_tokens=TEXT_TOKENS)
    for cache, computed in ((own, kv_cache_bytes(size, settings)), (text, cross_cache_bytes(size))):
        allocated = sum(buffer.numel() * buffer.element_size() for buffer in (*cache.keys, *cache.values))
        if allocated != computed:
            raise SystemExit(f"{type(cache).__name__}: {allocated} bytes allocated, {computed} computed.")


def make_rows(checkpoint: HeaderCheckpoint, settings: StreamSettings, formats: list[str]) -> Iterator[Row]:
    """One row per format."""
    size = checkpoint.size
    check_formulas(size, settings)
    caches = (kv_cache_bytes(size, settings), cross_cache_bytes(size), decoder_cache_bytes(size, settings))
    for name in formats:
        spec = SPECS[name]
        estimate = checkpoint.estimate(settings, spec)
        # Cards with FP8 units multiply FP8 as it is; INT8 weights stay as they are too.
        streaming = estimate.streaming - checkpoint.dequantized(spec)
        yield Row(
            size.name,
            name,
            f"{settings.width}x{settings.height}",
            settings.context_frames,
            estimate.transformer,
            estimate.vae,
            *caches,
            activations=streaming - sum(caches),
            overhead=DEVICE_OVERHEAD,
        )


def _layers_by_dim(size: ModelSize) -> int:
    heads, head_dim = size.transformer["num_attention_heads"], size.transformer["attention_head_dim"]
    return int(size.transformer["num_layers"] * heads * head_dim)


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=_names, default=["14B", "1.3B"])
    parser.add_argument("--formats", type=_names, default=list(SPECS))
    parser.add_argument("--resolutions", type=_names, default=["576x320", "832x480", "1280x720"])
    parser.add_argument("--contexts", type=_names, default=["3", "6"])
    options = parser.parse_args(arguments)
    # Casting on the meta device is meant here.
    diffusers_logging.set_verbosity_error()
    print("| " + " | ".join(_COLUMNS) + " |")
    print("|" + " --- |" * len(_COLUMNS))
    for size_name in options.sizes:
        with tempfile.TemporaryDirectory() as folder:
            checkpoint = HeaderCheckpoint(Path(folder), SIZES[size_name])
            for resolution, context in itertools.product(options.resolutions, options.contexts):
                width, height = (int(side) for side in resolution.split("x"))
                settings = StreamSettings(width=width, height=height, context_frames=int(context), steps=2)
                for row in make_rows(checkpoint, settings, options.formats):
                    print("| " + " | ".join(row.cells()) + " |", flush=True)


if __name__ == "__main__":
    main()
