"""Stream on cards of 8 to 24 GB: what runs, how fast, and what the bus has to carry, beside everything resident.

    python benchmarks/small_cards.py --caps 7.4,11.4,15.4,23.4 --blocks 20 [--json]
    python benchmarks/small_cards.py --size tiny --device cpu --json

A checkpoint with random weights (FP8 in ComfyUI's format, the text encoder in BF16) is written to a temporary folder
and loaded by the pack's own code. On a GPU torch's memory is capped at each number of GiB, and the stream gets as much;
on a CPU there is no cap, and a pretended one makes layers stream. Under a cap the plan decides, as it does for users,
whether the KV cache is in 8 bits and whether the context is fused with the first step; the pictures are compared with
those of everything resident with the same two settings. "Plain" is without both.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

# Under a cap, what the allocator cannot use counts: segments that grow leave less of it. Read when torch is imported.
os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import psutil
import streamblocks_path  # noqa: F401
import torch
from full_size_models import SIZES, ModelSize, build_text_encoder, build_transformer, build_vae
from small_card_figures import GIB, Case, Figures, line
from weight_formats import layer_replacement

from streamblocks.families.kv_policies import KV_AUTO, KV_INT8, KV_PLAIN
from streamblocks.memory.cleanup import release_cached_memory
from streamblocks.memory.json_text import json_text
from streamblocks.stream.host_memory import MARGIN
from streamblocks.stream.layer_streaming import LayerStreamer, streamer_of
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import COMPILE_NOTHING, COMPILE_TRANSFORMER, Recipe
from streamblocks.stream.residency import PlainResidency
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.checkpoints.quantized_checkpoint import save_quantized_transformer
from streamblocks.wan.tiny_model import write_tiny_model

STEADY = 2


class PretendedCard(PlainResidency):
    """A device with so many bytes, for devices that have no counters."""

    def __init__(self) -> None:
        super().__init__()
        self.available = 2**62

    def available_bytes(self, device: torch.device) -> int | None:
        """As given; at first without a bound."""
        return self.available


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(SIZES), default="14B")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--caps", default="7.4,11.4,15.4,23.4", help="GiB, the card without a context and a desktop")
    parser.add_argument("--resolutions", default="", help="one for all caps; otherwise the largest that is usual there")
    parser.add_argument("--blocks", type=int, default=20)
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=True, help="not tiny")
    parser.add_argument("--resident", action=argparse.BooleanOptionalAction, default=True, help="for comparison")
    parser.add_argument("--cap-torch", action=argparse.BooleanOptionalAction, default=True, help="cap torch's memory")
    parser.add_argument("--plain", action=argparse.BooleanOptionalAction, default=True, help="resident without savings")
    parser.add_argument("--ram", type=float, help="GB for streamed layers; those that do not fit lie on the disk")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        benchmark = Benchmark(Path(folder), options)
        benchmark.run()
    if options.json:
        print(json_text(benchmark.summary()))


class Benchmark:
    """One run of the program."""

    def __init__(self, folder: Path, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        if self.device.type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.recipe = write_pipeline(folder, SIZES[options.size], self.device, options.compile)
        self.results: list[tuple[Case, Figures]] = []
        # By size, format of the past, and whether the context was fused.
        self._pictures: dict[tuple[int, int, str, bool], torch.Tensor] = {}
        self._resident_fps: dict[tuple[int, int], float] = {}

    def run(self) -> None:
        """Everything resident at each size, then each cap; prints each as soon as it is measured."""
        on_card = self.device.type == "cuda"
        if on_card:
            caps = [float(cap) for cap in self.options.caps.split(",")]
            cases = [Case(cap, *self._size(cap)) for cap in caps]
            sizes = dict.fromkeys((case.width, case.height) for case in cases)
            kinds = (False, True) if self.options.plain else (True,)
            whole = [Case(None, *size, saving) for size in sizes for saving in kinds]
            cases = [*(whole if self.options.resident else []), *cases]
        else:
            cases = [Case(None, 96, 96, True), Case(0.0, 96, 96, True)]
        for case in cases:
            figures = self._measure(case)
            self.results.append((case, figures))
            if not self.options.json:
                print(line(case, figures), flush=True)

    def _size(self, cap: float) -> tuple[int, int]:
        text = self.options.resolutions or ("576x320" if cap < 10 else "832x480")
        width, height = (int(side) for side in text.split("x"))
        return width, height

    def _measure(self, case: Case) -> Figures:
        try:
            return self._stream(case)
        except (MemoryError, torch.OutOfMemoryError) as error:
            return Figures(failed=str(error).splitlines()[0][:300])
        finally:
            release_materialised()
            if self.device.type == "cuda":
                torch.cuda.set_per_process_memory_fraction(1.0)
            torch._dynamo.reset()
            release_cached_memory(self.device)

    def _stream(self, case: Case) -> Figures:
        settings = StreamSettings(
            width=case.width,
            height=case.height,
            blocks=self.options.blocks,
            kv_format={None: KV_AUTO, True: KV_INT8, False: KV_PLAIN}[case.saving],
            fuse_context=case.saving is True,
        )
        pipeline = self._materialise(case, settings)
        if self.device.type == "cuda":
            settings = replace(settings, memory_gb=0.0 if case.cap is None else case.cap * GIB / 1e9)
            torch.cuda.reset_peak_memory_stats(self.device)
        with self._pretended_ram():
            settings = pipeline.check_fit(settings)
        times, pictures, bytes_after, copied = [], [], [], []
        with Session(pipeline, settings) as session:
            for _ in range(settings.blocks):
                before = copied_bytes(pipeline)
                began = time.perf_counter()
                block = session.run_block("random weights")
                times.append(time.perf_counter() - began)
                pictures.append(block.frames)
                copied.append(copied_bytes(pipeline) - before)
                bytes_after.append(allocated(self.device))
        return self._figures(case, settings, pipeline, times, pictures, bytes_after, copied)

    def _pretended_ram(self) -> AbstractContextManager[object]:
        """While a plan is made: the others lie on the disk."""
        if self.options.ram is None:
            return nullcontext()
        free = SimpleNamespace(available=int(self.options.ram * 1e9) + MARGIN)
        return patch.object(psutil, "virtual_memory", lambda: free)

    def _materialise(self, case: Case, settings: StreamSettings) -> BuiltInPipeline:
        pretended = PretendedCard() if self.device.type != "cuda" and case.cap is not None else None
        if self.device.type == "cuda" and case.cap is not None and self.options.cap_torch:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(case.cap * GIB / total)
        pipeline = materialise(self.recipe, residency=pretended or PlainResidency())
        assert isinstance(pipeline, BuiltInPipeline)
        if pretended is not None:
            pretended.available = pipeline.fit.estimate(self.recipe.quantization, settings).least
        return pipeline

    def _figures(
        self,
        case: Case,
        settings: StreamSettings,
        pipeline: BuiltInPipeline,
        times: list[float],
        pictures: list[torch.Tensor],
        bytes_after: list[int],
        copied: list[int],
    ) -> Figures:
        made, size = torch.cat(pictures), (case.width, case.height)
        steady = slice(STEADY, None)
        fps = sum(len(part) for part in pictures[steady]) / sum(times[steady])
        kind = (*size, settings.kv_format, settings.fuse_context)
        if case.cap is None:
            self._pictures[kind] = made
            if not case.saving:
                self._resident_fps[size] = fps
        seconds = sum(times[steady]) / len(times[steady])
        streamer = streamer_of(pipeline.pipe.transformer)
        total = pipeline._store.components["transformer"].bytes
        away, slots = (streamer.host_bytes + streamer.disk_bytes, streamer.slot_bytes) if streamer else (0, 0)
        per_block = sum(copied[steady]) // len(copied[steady])
        known = self._pictures.get(kind)
        described = pipeline.describe()
        return Figures(
            layers_streamed=0 if streamer is None else len(streamer.streamed),
            resident_weight_bytes=total - away,
            streamed_weight_bytes=slots,
            copied_bytes=per_block,
            fps=fps,
            block_seconds=seconds,
            peak_bytes=torch.cuda.max_memory_reserved(self.device) if self.device.type == "cuda" else None,
            growth_bytes=bytes_after[-1] - bytes_after[STEADY],
            bus_rate=per_block / seconds / 1e9,
            kv_format=settings.kv_format,
            fused=settings.fuse_context,
            of_resident=fps / self._resident_fps[size] if size in self._resident_fps else 0.0,
            same_pictures=None if known is None else torch.equal(made, known),
            largest_difference=0 if known is None else largest_difference(made, known),
            streaming=described["streaming"].get("transformer", {}),
            notices=tuple(text for text in described["notices"] if "stay on the device" in text),
        )

    def summary(self) -> dict[str, Any]:
        """One object: the last case in short, and all of them."""
        streamed = self.results[-1][1]
        return {
            "pictures_equal": streamed.same_pictures,
            "resident_weight_bytes": streamed.resident_weight_bytes,
            "streamed_weight_bytes": streamed.streamed_weight_bytes,
            "layers_streamed": streamed.layers_streamed,
            "cases": [asdict(case) | asdict(figures) for case, figures in self.results],
        }


def write_pipeline(folder: Path, size: ModelSize, device: torch.device, compiled: bool) -> Recipe:
    """Write a pipeline of random weights; the recipe that loads it, the transformer compiled if asked (never tiny)."""
    if size.name == "tiny":
        write_tiny_model(folder, layers=8)
        return Recipe(str(folder), device=str(device))
    write_tiny_model(folder)
    transformer = build_transformer(size, device, torch.bfloat16, replace_linear=layer_replacement("fp8-tensor", size))
    file = save_quantized_transformer(transformer, folder / "transformer.safetensors")
    del transformer
    build_vae(size, torch.device("cpu"), torch.float16).save_pretrained(folder / "vae")
    release_cached_memory(device)
    encoder = build_text_encoder(size, device, torch.bfloat16)
    encoder.save_pretrained(folder / "text_encoder")
    del encoder
    release_cached_memory(device)
    compile_what = COMPILE_TRANSFORMER if compiled else COMPILE_NOTHING
    return Recipe(str(file), components=str(folder), device=str(device), compile=compile_what)


def copied_bytes(pipeline: BuiltInPipeline) -> int:
    """Bytes copied to slots so far, by all components."""
    streamers: list[LayerStreamer | None] = [
        streamer_of(module) for module in (pipeline.pipe.transformer, pipeline.pipe.text_encoder) if module is not None
    ]
    return sum(streamer.copied_bytes for streamer in streamers if streamer is not None)


def largest_difference(made: torch.Tensor, known: torch.Tensor) -> int:
    """Of uint8 pictures of one shape, taken one by one: a whole video in wider numbers takes gigabytes."""
    return max(int((one.int() - other.int()).abs().max()) for one, other in zip(made, known, strict=True))


def allocated(device: torch.device) -> int:
    """Bytes of tensors on a CUDA device; 0 elsewhere."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


if __name__ == "__main__":
    main()
