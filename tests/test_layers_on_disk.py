"""Layers for which there is no RAM: on the disk, read ahead of their use, with the same pictures."""

import errno
import gc
import re
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from test_estimate import SmallCard
from test_layer_plan import LAYERS, TOTAL, NoWatcher
from test_layer_streaming import CPU, layers, run

from streamblocks.memory.tensor_bytes import live_tensor_bytes
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream import scratch_disk, stored_layers, transfer_rates
from streamblocks.stream.copy_queue import DirectCopyQueue
from streamblocks.stream.host_memory import MARGIN, place_layers
from streamblocks.stream.layer_plan import LayerPlan, plan_layers
from streamblocks.stream.layer_streaming import LayerStreamer, streamer_of
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.read_ahead import ReadAhead, ReadCount
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.save_quantized import save_quantized_pipeline
from streamblocks.stream.scratch_disk import DiskBlock, folder_on_disk
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("no_pipeline")


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "streamblocks disk reader"]


@pytest.mark.parametrize("kind", ["bf16", "fp8", "int8"])
@pytest.mark.parametrize(("streamed", "on_disk"), [((3,), (3,)), (range(7), (1, 4, 6)), (range(7), range(7))])
def test_layers_from_the_disk_compute_what_resident_ones_do(kind, streamed, on_disk, tmp_path):
    module = layers(kind)
    x = torch.randn(5, 16, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)
    each = [one(x) for one in module]
    expected = run(module, x)
    streamer = LayerStreamer(module, CPU, folder=tmp_path)
    streamer.arrange(streamed, on_disk)
    # Closed, they are read from the file.
    assert torch.equal(run(module, x), expected)
    streamer.open()
    assert len(readers()) == 1
    for _ in range(3):
        assert torch.equal(run(module, x), expected)
    for index in (6, 0, 3, 3, 5, 1, 2, 4, 0):
        assert torch.equal(module[index](x), each[index])
    # Whatever is asked for next, what was under way before does not come after it.
    for index in (0, 3, 6, 0, 6, 3):
        streamer.after_layer(index) if index in streamed else None
        assert torch.equal(module[index](x), each[index])
    assert torch.equal(run(module, x), expected)
    for stored, disk in (((0, 1, 2, 3, 4), (4,)), ((0, 1, 2, 3, 4), (0, 1)), ((4, 5), ()), ((4, 5), (5,)), ((), ())):
        streamer.arrange(stored, disk)
        assert (streamer.streamed, streamer.on_disk) == (stored, disk) and not readers()
        streamer.open()
        assert torch.equal(run(module, x), expected)
    assert streamer.disk_bytes == streamer.host_bytes == 0


def test_layers_on_the_disk_take_no_memory_and_leave_nothing_behind(tmp_path):
    gc.collect()
    before = live_tensor_bytes()
    module = layers("float32")
    streamer = LayerStreamer(module, CPU, folder=tmp_path)
    streamer.arrange(range(7), range(7))
    streamer.open()
    slots, one = streamer.slot_bytes, streamer.disk_bytes // 7
    assert slots == 3 * one and streamer.host_bytes == 0
    # Slots, and two layers that are being read.
    assert live_tensor_bytes() - before == 5 * one
    # Files without a name.
    assert not list(tmp_path.iterdir())
    del streamer
    gc.collect()
    assert not readers()


def test_the_reader_is_ahead_of_what_is_asked_for(tmp_path):
    """Two layers are read before anything is asked for, and the next when one was copied; no layer twice."""
    read, copied = [], []
    done = threading.Semaphore(0)

    class Watched(DiskBlock):
        def __init__(self, index):
            self.index = index
            super().__init__(torch.full((1000 + index,), index, dtype=torch.uint8), tmp_path)

        def read_into(self, target):
            read.append(self.index)
            super().read_into(target)
            done.release()

    def copy(data):
        copied.append((len(data), int(data[0]), int(data[-1])))
        return len(data)

    count = ReadCount()
    reader = ReadAhead({index: Watched(index) for index in (2, 5, 7, 9)}, DirectCopyQueue(), count, pin=False)
    assert reader.host_bytes == 2 * 1009
    for _ in range(2):
        done.acquire(timeout=10)
    assert read == [2, 5] and not copied
    for place, index in enumerate((2, 5, 7, 9, 2, 5)):
        assert reader.request(index, copy).result(timeout=10) == 1000 + index
        done.acquire(timeout=10)
        assert read == [2, 5, 7, 9, 2, 5, 7, 9][: place + 3]
    # Out of order: what was read in vain makes room.
    assert reader.request(5, copy).result(timeout=10) == 1005
    assert copied == [(1000 + index, index, index) for index in (2, 5, 7, 9, 2, 5, 5)]
    reader.close()
    assert not readers() and count.bytes == sum(1000 + index for index in read) and count.rate > 0


def test_a_disk_that_fails_is_said_by_the_next_layer(tmp_path, monkeypatch):
    module = layers("float32")
    expected = run(module, torch.ones(1, 16))
    streamer = LayerStreamer(module, CPU, folder=tmp_path)
    streamer.arrange(range(7), (5,))
    block = streamer._stored.on_disk[5]
    monkeypatch.setattr(block, "_file", BrokenFile())
    streamer.open()
    told = f"a layer kept in a temporary file in {tmp_path} cannot be read .Input/output error.: check the disk and run"
    for _ in range(2):
        with pytest.raises(OSError, match=told):
            run(module, torch.zeros(1, 16))
    monkeypatch.undo()
    streamer.close()
    assert not readers()
    streamer.open()
    assert torch.equal(run(module, torch.ones(1, 16)), expected)


class BrokenFile:
    """On a disk that fails."""

    def seek(self, place):
        pass

    def readinto(self, target):
        raise OSError(errno.EIO, "Input/output error")


def test_a_full_disk_is_said_and_leaves_the_layers_as_they_were(tmp_path, monkeypatch):
    module = layers("float32")
    expected = run(module, torch.ones(1, 16))
    streamer = LayerStreamer(module, CPU, folder=tmp_path)
    streamer.arrange(range(7))

    def full(*arguments, **named):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(scratch_disk.tempfile, "TemporaryFile", full)
    with pytest.raises(OSError, match=f"disk of {tmp_path} is full: a layer of .* does not fit there; free some space"):
        streamer.arrange(range(7), (5,))
    streamer.open()
    assert streamer.on_disk == () and torch.equal(run(module, torch.ones(1, 16)), expected)


def test_a_folder_in_ram_is_no_disk(tmp_path, monkeypatch):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4"), SimpleNamespace(mountpoint=str(tmp_path), fstype="tmpfs")]
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: mounts)
    assert folder_on_disk([tmp_path / "not" / "there", Path("/var/tmp")]) == Path("/var/tmp")
    assert folder_on_disk([tmp_path]) is None


def plan_of(name, *arguments) -> LayerPlan:
    plan = plan_layers(name, *arguments)
    assert plan is not None
    return plan


def ram(monkeypatch, available, disk=10**13):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=available + MARGIN))
    monkeypatch.setattr(psutil, "disk_usage", lambda folder: SimpleNamespace(free=disk))


@pytest.mark.parametrize(("memory", "on_disk"), [(40, 0), (39, 3), (38, 4), (2, 40), (0, 40)])
def test_as_many_layers_are_in_ram_as_fit(monkeypatch, memory, on_disk):
    """Two more than what is on the disk: they are read into."""
    plan = plan_of("transformer", TOTAL, LAYERS, 1620)
    ram(monkeypatch, memory * 340)
    placed = place_layers({"transformer": plan}, {"transformer": LAYERS}, held=0, folder=Path("/"))["transformer"]
    assert len(placed.on_disk) == on_disk and placed.disk_bytes == 340 * on_disk
    assert placed.host_bytes == 340 * (40 - on_disk + (2 if on_disk else 0))
    # In RAM already, they count as free; and few layers more or less are not worth moving any.
    ram(monkeypatch, 0)
    held = place_layers({"transformer": plan}, {"transformer": LAYERS}, held=340 * memory, folder=Path("/"))
    assert held["transformer"] == placed
    again = {"transformer": (0, 1, 2)}
    ram(monkeypatch, 38 * 340)
    kept = place_layers({"transformer": plan}, {"transformer": LAYERS}, held=0, folder=Path("/"), now=again)
    assert kept["transformer"].on_disk == (0, 1, 2)


def test_the_transformer_gets_the_ram_and_neither_ram_nor_disk_is_said(monkeypatch):
    size = [10**9] * 4
    plans = {name: plan_of(name, 5 * 10**9, size, 4 * 10**9 + 1) for name in ("transformer", "text_encoder")}
    assert [len(plan.streamed) for plan in plans.values()] == [4, 4]
    sizes = dict.fromkeys(plans, size)
    ram(monkeypatch, 4 * 10**9)
    placed = place_layers(plans, sizes, held=0, folder=Path("/"))
    assert [len(plan.on_disk) for plan in placed.values()] == [0, 4]
    assert placed["text_encoder"].describe() == (
        "0 of 4 layers of the text encoder stay on the device, 4 are read from 4.0 GB on the disk"
    )
    ram(monkeypatch, 4 * 10**9, disk=10**9)
    with pytest.raises(MemoryError, match=r"need 8\.0 GB: of RAM 4\.0 GB can be used, and 1\.0 GB of /: close"):
        place_layers(plans, sizes, held=0, folder=Path("/"))
    with pytest.raises(MemoryError, match=r"4\.0 GB can be used, and no folder for temporary files is on a"):
        place_layers(plans, sizes, held=0, folder=None)
    place_layers(plans, sizes, held=0, folder=Path("/"), kept=3 * 10**9)


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The tiny model with 8 layers in transformer and text encoder."""
    return write_tiny_model(tmp_path_factory.mktemp("deep"), layers=8)


class Loading:
    """Counts layers that are written, and the memory held meanwhile, besides what is seen through files."""

    def __init__(self, monkeypatch):
        self.written = 0
        self.live: dict[int, int] = {}
        seen = 0

        def write(data, folder):
            nonlocal seen
            self.written += 1
            if self.written in (2, 8, 10, 16):
                # Not for each: counting goes through all objects.
                self.live[self.written] = live_tensor_bytes(collect=False) - seen
            seen += data.numel()
            return DiskBlock(data, folder)

        monkeypatch.setattr(stored_layers, "DiskBlock", write)


def test_a_stream_without_ram_has_the_same_pictures_and_is_saved_as_ever(deep, tmp_path, monkeypatch):
    """Loaded with all streamed layers on the disk, one after the other; saved, and rearranged in RAM."""
    settings = StreamSettings(width=96, height=96, steps=1)
    recipe = Recipe(str(deep), quantization=QuantizationSpec("fp8", "per tensor"))

    def stream(pipeline, texts_on_disk=()):
        fitted = replace(pipeline.check_fit(settings), fuse_context=False)
        if texts_on_disk:
            pipeline._store.stream_layers("text_encoder", texts_on_disk, texts_on_disk)
        with Session(pipeline, fitted) as session:
            return session.run_block("waves").frames

    card = SmallCard(10**12)
    whole = materialise(recipe, residency=card)
    assert isinstance(whole, BuiltInPipeline)
    expected = stream(whole)
    save_quantized_pipeline(whole, tmp_path / "whole.safetensors", NoWatcher())
    card.available = whole.fit.estimate(recipe.quantization, settings).least
    release_materialised()
    del whole
    loading = Loading(monkeypatch)
    monkeypatch.setattr(transfer_rates, "_BYTES", 2**16)
    ram(monkeypatch, 0)
    pipeline = materialise(recipe, residency=card)
    assert isinstance(pipeline, BuiltInPipeline)
    assert torch.equal(stream(pipeline, tuple(range(8))), expected)
    streamer, texts = streamer_of(pipeline.pipe.transformer), streamer_of(pipeline.pipe.text_encoder)
    assert streamer is not None and texts is not None
    assert len(streamer.on_disk) == len(texts.on_disk) == 8 and streamer.host_bytes == texts.host_bytes == 0
    assert loading.written == 16
    # While the text encoder's layers come, then the transformer's: no more memory from one to the next.
    assert loading.live[2] == loading.live[8] and loading.live[10] == loading.live[16]
    told = pipeline.describe()
    assert told["streaming"]["transformer"]["layers_on_disk"] == 8
    assert told["streaming"]["transformer"]["bound"] in ("disk", "compute")
    sentence = (
        r"0 of 8 layers of the transformer stay on the device, 8 are read from 0\.0 GB on the disk; the context's pass "
        r"fused with the first step: .* at least .* s a block \(.* at .* GB/s\), at most .* fps; in the last block "
        r"(the disk|computing) set the pace\."
    )
    assert any(re.fullmatch(sentence, text) for text in told["notices"]), told["notices"]
    save_quantized_pipeline(pipeline, tmp_path / "disk.safetensors", NoWatcher())
    assert (tmp_path / "disk.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    ram(monkeypatch, 10**10)
    pipeline.check_fit(settings)
    assert streamer.on_disk == () and streamer.host_bytes > 0


def test_a_weight_that_is_not_finite_is_found_on_the_disk(deep):
    pipeline = materialise(Recipe(str(deep)))
    assert isinstance(pipeline, BuiltInPipeline)
    pipeline._store.stream_layers("transformer", tuple(range(8)), (1, 5))
    # Written to the file.
    pipeline.transformer().get_parameter("blocks.5.ffn.net.2.weight").data[0, 0] = float("nan")
    pipeline._store.bring(["transformer"], working_bytes=0)
    assert pipeline.is_resident() is False and len(readers()) == 1
    assert "blocks.5.ffn.net.2.weight" in str(pipeline.explain_not_finite())
    assert not readers()
