"""What streamed layers give back on a card: after a run, a stop, another model, and beside models of ComfyUI's.

    python benchmarks/layers_given_back.py [--size 1.3B] [--comfyui PATH]

Streams a pipeline of random weights, some of its layers in RAM, and counts after each event what torch holds on the
card, how many bytes of RAM are pinned, and how many bytes the slots take. Pictures are compared with those of the first
run. With ComfyUI's source at PATH, a model of ComfyUI's own comes and goes between the blocks of a stream.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import streamblocks_path  # noqa: F401
import torch
from diffusers.utils import logging as diffusers_logging
from full_size_models import SIZES
from small_cards import write_pipeline
from torch import nn

from streamblocks.memory.cleanup import release_cached_memory
from streamblocks.stream import copy_queue
from streamblocks.stream.layer_streaming import streamer_of
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import PlainResidency, Residency
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

GIB = 2**30
PROMPT = "random weights"


class StoppedError(Exception):
    """Raised in the middle of a block, as a cancel and an error are."""


class PinnedBytes:
    """Counts bytes of RAM that are registered with CUDA, for as long as the program runs."""

    def __init__(self) -> None:
        self.now = 0
        register, unregister = copy_queue._register, copy_queue._unregister

        def count_in(data: torch.Tensor) -> bool:
            done = register(data)
            self.now += data.numel() if done else 0
            return done

        def count_out(data: torch.Tensor) -> None:
            unregister(data)
            self.now -= data.numel()

        copy_queue._register, copy_queue._unregister = count_in, count_out


class Checks:
    """Runs the events one after another and prints what is held after each."""

    def __init__(self, recipe: Recipe, other: Recipe, residency: Callable[[], Residency], pinned: PinnedBytes) -> None:
        self.recipe, self.other = recipe, other
        self.make_residency = residency
        self.pinned = pinned
        self.expected: torch.Tensor | None = None

    def run(self, comfyui: ModuleType | None) -> None:
        """Every event in turn."""
        self._report("at first", None)
        pipeline = self._materialise(self.recipe)
        self._stream(pipeline, "a run")
        self._stream(pipeline, "a second run")
        for block in range(3):
            for at_pass in (0, 3):
                self._stop(pipeline, block, at_pass)
        self._stream(pipeline, "a run after those")
        if comfyui is not None:
            self._beside(pipeline, comfyui)
        del pipeline
        pipeline = self._materialise(self.other)
        self._report("another model, not loaded yet", pipeline)
        self._stream(pipeline, "another model", compare=False)
        del pipeline
        release_materialised()
        self._report("released", None)

    def _materialise(self, recipe: Recipe) -> BuiltInPipeline:
        pipeline = materialise(recipe, residency=self.make_residency(), default_device=torch.device("cuda", 0))
        assert isinstance(pipeline, BuiltInPipeline)
        return pipeline

    def _settings(self, pipeline: BuiltInPipeline) -> StreamSettings:
        settings = StreamSettings(width=576, height=320, blocks=3)
        least = pipeline.fit.estimate(self.recipe.quantization, settings).least
        budget = least + pipeline._store.components["transformer"].bytes * 3 // 10
        return pipeline.check_fit(replace(settings, memory_gb=budget / 1e9))

    def _stream(
        self,
        pipeline: BuiltInPipeline,
        event: str,
        *,
        compare: bool = True,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        made = []
        with Session(pipeline, self._settings(pipeline)) as session:
            for _ in range(3):
                made.append(session.run_block(PROMPT).frames)
                between()
        pictures = torch.cat(made)
        self.expected = pictures if self.expected is None else self.expected
        same = "" if not compare else f", same pictures: {torch.equal(pictures, self.expected)}"
        self._report(event, pipeline, same)

    def _stop(self, pipeline: BuiltInPipeline, block: int, at_pass: int) -> None:
        calls = 0

        def on_pass(index: int) -> None:
            nonlocal calls
            calls += index == 0
            if (calls - 1, index) == (block, at_pass):
                raise StoppedError

        try:
            with Session(pipeline, self._settings(pipeline), on_pass=on_pass) as session:
                for _ in range(3):
                    session.run_block(PROMPT)
        except StoppedError:
            self._report(f"stopped in block {block} at pass {at_pass}", pipeline)
            return
        raise AssertionError("the stream was not stopped")

    def _beside(self, pipeline: BuiltInPipeline, management: ModuleType) -> None:
        """A model of ComfyUI's that needs the card for itself comes between the blocks, so ours goes each time."""
        from comfy.model_patcher import ModelPatcher

        card, cpu = torch.device("cuda", 0), torch.device("cpu")
        release_cached_memory(card)
        # As if the card were one of 20 GiB.
        filling = torch.empty(torch.cuda.mem_get_info(card)[0] - 20 * GIB, dtype=torch.uint8, device=card)
        with torch.device("meta"):
            model = nn.Sequential(*[nn.Linear(2**14, 2**14, bias=False, dtype=torch.bfloat16) for _ in range(34)])
        model.to_empty(device=cpu)
        patcher = ModelPatcher(model.requires_grad_(False), load_device=card, offload_device=cpu)

        def come() -> None:
            management.load_models_gpu([patcher], force_full_load=True)
            there = sum(weight.nbytes for weight in model.parameters() if weight.is_cuda)
            ours = sum(weight.nbytes for weight in pipeline.pipe.transformer.parameters() if weight.is_cuda)
            self._report(f"ComfyUI's model came, {there / GIB:.0f} GiB ({ours} of ours)", pipeline)

        self._stream(pipeline, "beside a model of ComfyUI's", between=come)
        management.unload_all_models()
        self._report("all of ComfyUI's models unloaded", pipeline)
        filling.resize_(0)

    def _report(self, event: str, pipeline: BuiltInPipeline | None, more: str = "") -> None:
        gc.collect()
        release_cached_memory(torch.device("cuda", 0))
        module = None if pipeline is None else pipeline.pipe.transformer
        streamer = None if module is None else streamer_of(module)
        slots = 0 if streamer is None else streamer.slot_bytes
        held = torch.cuda.memory_allocated()
        print(
            f"{event:>48}: {held:>15,} bytes held, {self.pinned.now:>14,} pinned, {slots:>13,} in slots{more}",
            flush=True,
        )


@contextmanager
def comfyui_management(path: str | None) -> Iterator[tuple[ModuleType | None, Callable[[], Residency]]]:
    """ComfyUI's model management and our residency under it; without a path, neither."""
    if path is None:
        yield None, PlainResidency
        return
    sys.path.insert(0, path)
    # The nodes' half of `host/` wants a whole server; only the model management is looked at here.
    package, files = ModuleType("streamblocks.host"), ModuleType("streamblocks.host.files_made")
    package.__path__ = [str(Path(__file__).resolve().parent.parent / "host")]
    vars(files)["temp_folder"] = lambda: Path(tempfile.gettempdir())
    sys.modules |= {module.__name__: module for module in (package, files)}
    import comfy.model_management

    from streamblocks.host.model_management import ComfyResidency

    with torch.inference_mode():
        yield comfy.model_management, ComfyResidency


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", choices=tuple(name for name in SIZES if name != "tiny"), default="1.3B")
    parser.add_argument("--comfyui", help="folder of ComfyUI's source")
    options = parser.parse_args(arguments)
    # The stops are meant; diffusers writes each with its traceback.
    diffusers_logging.set_verbosity(logging.CRITICAL)
    pinned = PinnedBytes()
    with tempfile.TemporaryDirectory() as folder:
        # A text encoder of few layers: its own streaming is the same, and writing all of it takes longer than the rest.
        size = replace(SIZES[options.size], text={**SIZES[options.size].text, "num_layers": 6})
        recipe = write_pipeline(Path(folder), size, torch.device("cuda", 0), compiled=False)
        sys.argv = sys.argv[:1]
        with comfyui_management(options.comfyui) as (management, residency):
            Checks(recipe, replace(recipe, dtype="float16"), residency, pinned).run(management)


if __name__ == "__main__":
    main()
