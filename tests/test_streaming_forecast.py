"""What a plan says to expect, and what the device waited for."""

from dataclasses import replace

import pytest
import torch
from test_layer_streaming import CPU, layers, run

from streamblocks.families.kv_policies import RECOMPUTE, ROLLING
from streamblocks.stream.copy_queue import DirectCopyQueue
from streamblocks.stream.layer_plan import LayerPlan
from streamblocks.stream.layer_streaming import LayerStreamer, streamer_of
from streamblocks.stream.materialise import materialise
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.stall_clock import BUS, DISK, StallClock
from streamblocks.stream.streaming_forecast import Pace, Rates, forecast
from streamblocks.stream.transfer_rates import measure_bus_rate, measure_disk_rate
from streamblocks.wan.tiny_model import write_tiny_model

GB = 10**9
PLAN = LayerPlan("transformer", 10, (0, 2, 4, 6, 8), 0, 3 * GB, on_disk=(2, 4), disk_bytes=2 * GB)


def test_the_slower_of_bus_and_disk_is_the_bound():
    """5 layers of 1 GB, of which 4 change slots: 20 GB in 5 passes; of the two on the disk one keeps its slot."""
    pace, sizes = Pace(passes=5, pictures=12), [GB] * 10
    bus = "the copies alone take at least 0.8 s a block (20.0 GB at 25 GB/s), at most 15 fps"
    disk = "reading the disk alone takes at least 2.5 s a block (5.0 GB at 2 GB/s), at most 4.8 fps"
    assert forecast(PLAN, sizes, pace, Rates(25 * GB, 2 * GB)) == disk
    assert forecast(PLAN, sizes, pace, Rates(25 * GB)) == bus
    assert forecast(PLAN, sizes, pace, Rates(25 * GB, 50 * GB)) == bus
    slow = "reading the disk alone takes at least 333 s a block (5.0 GB at 0.015 GB/s), at most 0.036 fps"
    assert forecast(PLAN, sizes, pace, Rates(25 * GB, 0.015 * GB)) == slow
    assert forecast(PLAN, sizes, pace, Rates()) == ""
    assert forecast(replace(PLAN, on_disk=()), sizes, pace, Rates(disk=GB)) == ""
    assert forecast(PLAN, sizes, Pace(1, unit="prompt"), Rates(GB)) == (
        "the copies alone take at least 4 s a prompt (4.0 GB at 1 GB/s)"
    )


class FakeQueue(DirectCopyQueue):
    """Has the times it is given."""

    def __init__(self):
        self.time = 0.0
        self.reached = 1e9

    def now(self):
        return self.time

    def seconds_between(self, earlier, later):
        return later - earlier if later <= self.reached else None


def test_what_the_device_waits_for_sets_the_pace():
    """Passes of three seconds from the first of four layers to the last."""
    queue = FakeQueue()
    clock = StallClock(queue)
    assert clock.read(1) is None

    def one_pass(bus, disk):
        for layer, (source, wait) in enumerate(((BUS, bus), (DISK, disk), (BUS, bus), (BUS, 0.0))):
            began = queue.time
            queue.time += wait
            clock.add(layer, source, began, queue.now())
            queue.time += 1 - wait

    for waits, expected, bound in (
        ((0, 0), (0, 0), "compute"),
        ((0.3, 0.1), (0.6 / 3, 0.1 / 3), "bus"),
        ((0.1, 0.9), (0.2 / 3, 0.9 / 3), "disk"),
    ):
        one_pass(*waits)
        stalls = clock.read(1)
        assert stalls is not None and (stalls.bus, stalls.disk) == pytest.approx(expected) and stalls.bound == bound
    # All three: 11 seconds from the first wait to the last.
    three = clock.read(9)
    assert three is not None and (three.bus, three.disk) == pytest.approx((0.8 / 11, 1.0 / 11))
    queue.reached = queue.time - 2
    assert clock.read(1) is None


def test_every_streamed_layers_wait_is_noted(tmp_path):
    module = layers("float32")
    streamer = LayerStreamer(module, CPU, folder=tmp_path)
    streamer.arrange((0, 2, 3, 5), (3,))
    streamer.open()
    for _ in range(20):
        run(module, torch.zeros(1, 16))
    noted = [[(stall.layer, stall.source) for stall in one] for one in streamer.stalls._passes]
    assert noted == [[(0, BUS), (2, BUS), (3, DISK), (5, BUS)]] * 16
    streamer.close()


@pytest.mark.usefixtures("no_pipeline")
def test_the_passes_of_a_block_are_those_that_copy(tmp_path):
    pipeline = materialise(Recipe(str(write_tiny_model(tmp_path, layers=4))))
    assert isinstance(pipeline, BuiltInPipeline)
    pipeline._store.stream_layers("transformer", (0, 1, 2, 3))
    streamer = streamer_of(pipeline.transformer())
    assert streamer is not None
    for policy, fused, passes in ((RECOMPUTE, True, 1), (RECOMPUTE, False, 2), (ROLLING, False, 2)):
        settings = StreamSettings(width=32, height=32, steps=1, kv_policy=policy, fuse_context=fused)
        assert settings.passes_per_block == passes
        assert settings.savings == ("the context's pass fused with the first step",) * fused
        with Session(pipeline, settings) as session:
            session.run_block("waves")
            before = streamer.copied_bytes
            session.run_block("waves")
        # Of four layers in three slots two change places.
        assert streamer.copied_bytes - before == passes * streamer.host_bytes // 2


def test_rates_are_measured_where_that_says_something(tmp_path, monkeypatch):
    assert measure_bus_rate(CPU) == 0.0
    assert measure_disk_rate(tmp_path) > 0 and not list(tmp_path.iterdir())
    monkeypatch.delattr("os.posix_fadvise")
    assert measure_disk_rate(tmp_path) == 0.0
