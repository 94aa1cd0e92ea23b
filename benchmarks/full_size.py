"""Stream Wan at full size with random weights: speed by stage, memory by block, and the device's own rates.

    python benchmarks/full_size.py --sizes 14B --formats bf16,fp8 --resolutions 832x480 --policies recompute \\
        --backends native,_native_cudnn --compile both --plain --json figures.json --time-budget 540

Needs no checkpoint, no network and no installation of this package. Each configuration's figures are printed and
written as soon as they are measured; for one that fails, the reason. `--sizes tiny` runs on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import os
import sys
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import streamblocks_path  # noqa: F401
import torch
from compiled_blocks import compiled
from device_rates import DeviceRates, measure_rates
from figure_table import configurations_table, rates_table, stage_table, work_table
from floors import attention_shape, device_of, linear_shapes, stage_floor
from full_size_models import SIZES, ModelSize
from full_size_options import parse_options
from random_pipeline import PipelineOptions, RandomPipeline
from stream_figures import run_plain_loop, run_stream
from stream_variants import DEFAULT_WINDOW, Variant, variants_of
from switched_kernels import without_kernels
from weight_formats import layer_replacement
from work_count import Work, count_block_work

from streamblocks.memory.cleanup import release_cached_memory
from streamblocks.memory.json_text import json_text
from streamblocks.stream.settings import StreamSettings


@dataclass
class Benchmark:
    """One run of the program: what was asked for and what was found so far."""

    options: argparse.Namespace
    device: torch.device
    deadline: float
    report: dict[str, Any] = field(default_factory=lambda: {"rates": {}, "work": {}, "configurations": []})
    _measured: dict[str, DeviceRates] = field(default_factory=dict)
    _counted: dict[str, dict[str, Work]] = field(default_factory=dict)

    def run(self) -> None:
        """Every configuration, by model size and format; each pipeline is built once."""
        self.report["environment"] = describe_environment(self.device)
        for size_name, weight_format in itertools.product(self.options.sizes, self.options.formats):
            if self._out_of_time():
                return
            size = SIZES[size_name]
            rates = self._rates(size)
            began = time.perf_counter()
            try:
                pipeline = self._build(size, weight_format)
            except Exception as error:
                self._note_failure({"size": size_name, "format": weight_format}, error)
                continue
            finally:
                release_cached_memory(self.device)
            load_seconds = time.perf_counter() - began
            load = {"load_seconds": load_seconds, "load_peak": load_peak(self.device)}
            for case, variant in self._cases(size_name, weight_format):
                if self._out_of_time():
                    break
                self._measure(case, variant, load, size, rates, pipeline)
            pipeline.release()
            del pipeline
            release_cached_memory(self.device)

    def _build(self, size: ModelSize, weight_format: str) -> RandomPipeline:
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        options = PipelineOptions(
            self.device,
            torch.bfloat16 if self.device.type == "cuda" else torch.float32,
            text_encoder=self.options.text_encoder,
            fused_vae=self.options.fused_vae,
            device_noise=self.options.device_noise,
            tiny_decoder=self.options.tiny_decoder,
        )
        return RandomPipeline(size, options, layer_replacement(weight_format, size))

    def _rates(self, size: ModelSize) -> DeviceRates:
        """Rates at this size's shapes, at the first resolution; measured once a size."""
        if size.name not in self._measured:
            settings = self._settings(self.options.resolutions[0], self.options.policies[0])
            rates = measure_rates(
                self.device,
                attention=attention_shape(size, settings),
                backends=self.options.backends,
                linears=linear_shapes(size, settings),
            )
            self._measured[size.name] = rates
            self.report["rates"][size.name] = rates.as_dict()
            self._write()
            print(
                f"\n{size.name} on {self.report['environment']['device']}\n{rates_table(rates.as_dict())}", flush=True
            )
        return self._measured[size.name]

    def _cases(self, size: str, weight_format: str) -> Iterator[tuple[dict[str, str], Variant]]:
        """Resolution outermost, so that a killed run has complete comparisons."""
        options = self.options
        compile_choices = {"off": ["off"], "on": ["on"], "both": ["off", "on"]}[options.compile]
        for resolution, policy, backend, choice, without in itertools.product(
            options.resolutions, options.policies, options.backends, compile_choices, options.without
        ):
            for variant in variants_of(options, policy, backend):
                case = {
                    "size": size,
                    "format": weight_format,
                    "resolution": resolution,
                    "policy": policy,
                    "backend": backend,
                    "compile": choice,
                    "variant": variant.describe(),
                    "without": without,
                }
                yield case, variant

    def _measure(
        self,
        case: dict[str, str],
        variant: Variant,
        load: dict[str, Any],
        size: ModelSize,
        rates: DeviceRates,
        pipeline: RandomPipeline,
    ) -> None:
        """One configuration: its figures, or the reason why there are none."""
        try:
            settings = self._settings(case["resolution"], case["policy"], variant)
            result = {**case, **load, **self._stream(case, settings, pipeline, variant)}
        except Exception as error:
            self._note_failure(case, error)
            return
        finally:
            release_cached_memory(self.device)
        result["floors_ms"] = self._floors(case, settings, size, rates, variant)
        if self.options.plain and case["compile"] == "off" and case["backend"] == self.options.backends[0]:
            result["plain"] = self._plain(settings, pipeline)
        self.report["configurations"].append(result)
        self._write()
        print(f"\n{configurations_table([result])}\n{stage_table(result)}", flush=True)
        for place, count in (result["sync_places"] or {}).items():
            print(f"host waits {count:>4} x {place}", flush=True)
        if variant.graphs:
            print(f"graphs: {result['graphs_recorded']} recorded. {result['graphs_off']}", flush=True)

    def _stream(
        self, case: dict[str, str], settings: StreamSettings, pipeline: RandomPipeline, variant: Variant
    ) -> dict[str, Any]:
        options = self.options
        pipeline.use_backend(case["backend"])
        profile_to = None
        if options.profile:
            label = "_".join(case.values()).replace(".", "-").replace("+", "-")
            profile_to = Path(os.environ.get("OUT", ".")) / f"profile_{label}.txt"
        choice = compiled(pipeline, backend=options.compile_backend) if case["compile"] == "on" else nullcontext()
        with without_kernels(case["without"]), choice, variant.applied(pipeline) as graphs:
            figures = run_stream(pipeline, settings, deadline=self.deadline, profile_to=profile_to).summary()
            recorded = {} if graphs is None else {"graphs_recorded": graphs.recorded, "graphs_off": graphs.off}
            return figures | recorded

    def _plain(self, settings: StreamSettings, pipeline: RandomPipeline) -> dict[str, Any]:
        try:
            return run_plain_loop(pipeline, settings, self.options.plain_blocks)
        except Exception as error:
            return {"error": describe_error(error)}
        finally:
            release_cached_memory(self.device)

    def _floors(
        self, case: dict[str, str], settings: StreamSettings, size: ModelSize, rates: DeviceRates, variant: Variant
    ) -> dict[str, dict[str, float]]:
        window = [] if variant.window == DEFAULT_WINDOW else [f"window {variant.window}"]
        key = " ".join((size.name, case["resolution"], case["policy"], *window))
        if key not in self._counted:
            self._counted[key] = count_block_work(size, settings).by_stage(settings)
            self.report["work"][key] = {stage: asdict(counted) for stage, counted in self._counted[key].items()}
            print(f"\nwork of one block, {key}\n{work_table(self.report['work'][key])}", flush=True)
        return {
            stage: asdict(stage_floor(counted, rates, size, case["format"]))
            for stage, counted in self._counted[key].items()
        }

    def _settings(self, resolution: str, policy: str, variant: Variant = Variant()) -> StreamSettings:  # noqa: B008
        width, height = (int(side) for side in resolution.split("x"))
        options = self.options
        return StreamSettings(
            width=width,
            height=height,
            blocks=options.blocks,
            steps=options.steps,
            kv_policy=policy,
            seed=options.seed,
            **variant.settings(),
        )

    def _note_failure(self, case: dict[str, str], error: Exception) -> None:
        reason = describe_error(error)
        print(f"\nfailed: {' '.join(case.values())}: {reason}", flush=True)
        blank = dict.fromkeys(
            ("size", "format", "resolution", "policy", "backend", "compile", "variant", "without"), "-"
        )
        self.report["configurations"].append({**blank, **case, "error": reason})
        self._write()
        # The traceback holds the frames, and with them the tensors, of what failed.
        error.__traceback__ = None
        gc.collect()

    def _out_of_time(self) -> bool:
        return time.monotonic() > self.deadline

    def _write(self) -> None:
        """Write the report so far atomically: the program may be killed at any moment."""
        if self.options.json is None:
            return
        target: Path = self.options.json
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f"{target.name}.part")
        part.write_text(json_text(self.report, indent=1), encoding="utf-8")
        part.replace(target)


def describe_error(error: Exception) -> str:
    """Type and first line."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def describe_environment(device: torch.device) -> dict[str, str]:
    """What the figures were measured on."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": name,
        "torch": torch.__version__,
        "cuda": torch.version.cuda or "",
        "python": sys.version.split()[0],
    }


def load_peak(device: torch.device) -> int | None:
    """The most bytes allocated since the last reset; None off CUDA."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    options = parse_options(__doc__ or "", arguments)
    benchmark = Benchmark(options, device_of(options.device), time.monotonic() + options.time_budget)
    benchmark.run()
    print(f"\n{configurations_table(benchmark.report['configurations'])}", flush=True)


if __name__ == "__main__":
    main()
