"""Stream Memory Report and Free Stream Memory in the embedded ComfyUI host, and the picture they show."""

import numpy as np
import pytest
from PIL import ImageDraw

from streamblocks.memory.growth import judge_growth
from streamblocks.memory.owners import REST, STATE, WEIGHTS, Owner
from streamblocks.memory.readings import MemoryReading
from streamblocks.memory.timeline import BLOCK_END, StageRecord, Timeline
from streamblocks.memory.timeline_plot import plot_timeline, series_of
from streamblocks.memory.timeline_table import write_table

from embedded_program import needs_embedded_host, run_in_host

GIB = 1 << 30

REPORT = """
prompt["report"] = {"class_type": "StreamBlocksMemoryReport", "inputs": {
    "timeline": [sampler_id, 3], "width": 480, "height": 320}}
prompt["free"] = {"class_type": "StreamBlocksFreeMemory", "inputs": {
    "anything": [sampler_id, 3], "drop_pipeline": True, "unload_models": False, "clear_compile_caches": True}}
"""
FIND = "sampler_id = next(key for key, node in prompt.items() if node['class_type'] == 'StreamBlocksSampler')"


@needs_embedded_host
def test_report_and_free(tmp_path):
    facts = run_in_host(
        tmp_path,
        f"""
{FIND}
{REPORT}
import importlib
points = []
news = importlib.import_module(PACK + ".stream.live_news").LiveNews
add = news.add_memory
news.add_memory = lambda self, point: (points.append(point), add(self, point))
sampler.update(blocks=1, steps=1, memory_timeline="off", reset_compile=True)
try:
    host.execute(prompt, {{"nodes": []}})
except ValueError as error:
    off = str(error)
assert points == []
sampler.update(blocks=7, keep_frames="all", memory_timeline="on")
runs = {{r.class_type: r for r in host.execute(prompt, {{"nodes": []}})}}
plot, table, text = runs["StreamBlocksMemoryReport"].outputs
shown = runs["StreamBlocksMemoryReport"].ui
passed, freed = runs["StreamBlocksFreeMemory"].outputs
timeline = runs["StreamBlocksSampler"].outputs[3]
current = importlib.import_module(PACK + ".stream.materialise").materialised_device()
report(off=off, plot=list(plot.shape), table=table, same=json.loads(text)["blocks"], shown=shown["images"],
       there=(host.temp / shown["images"][0]["filename"]).exists(), said=shown["text"][0], passed=passed is timeline,
       freed=freed, on_node=said[-1], current=current, ends=[p["block"] for p in points if p["stage"] == "block end"],
       first=[p["first"] for p in points].count(True), owners=points[-1]["owners"])
""",
    )
    assert "timeline was not recorded: set the sampler's memory_timeline to 'on'" in facts["off"]
    assert facts["plot"] == [1, 320, 480, 3]
    assert facts["same"] == 7 and facts["there"]
    # All pictures are kept, and that is what grows.
    assert "grows" in facts["said"] and "pictures: kept" in facts["said"] and "keep_frames" in facts["said"]
    assert facts["said"] in facts["table"] and "| block end" in facts["table"]
    assert facts["passed"] and facts["current"] is None
    assert facts["freed"].startswith(f"{facts['on_node']}; ")
    assert facts["freed"].startswith("Freed ") and "dropped the pipeline, cleared 0 compiled" in facts["freed"]
    assert facts["ends"] == list(range(7)) and facts["first"] == 1
    assert any(label == "state: kv_cache" for label, _ in facts["owners"])


def made(blocks, card=None):
    records = []
    for block in range(blocks):
        owners = (
            Owner(WEIGHTS, "transformer bfloat16", 20 * GIB),
            Owner(STATE, "kv_cache", 7 * GIB),
            Owner(STATE, "grows", block * GIB),
            Owner(REST, "", -1024),
        )
        held = sum(owner.bytes for owner in owners)
        step = MemoryReading(held, peak=held + 2 * GIB)
        records.append(StageRecord("step 0", block, block, step, event="prompt changed" if block == 3 else ""))
        reading = MemoryReading(held, peak=held, retries=int(block > 5))
        records.append(StageRecord(BLOCK_END, block, block + 0.5, reading, owners=owners))
    return Timeline("cuda:0", card, tuple(records), blocks=blocks)


def test_series_hold_owners_peaks_events_and_the_card():
    series = series_of(made(8, card=48 * GIB))
    assert series.blocks == tuple(range(8))
    assert series.owners["state: kv_cache"] == (7 * GIB,) * 8
    assert list(series.owners) == ["weights: transformer bfloat16", "state: kv_cache", "state: grows", "rest"]
    assert series.owners["rest"] == (0,) * 8
    assert series.peaks[-1] == 27 * GIB - 1024 + 7 * GIB + 2 * GIB
    assert series.events == ((3, "prompt changed"), (6, "allocation retried"))
    assert series.shows_card and series.top == 48 * GIB
    # A card much larger than the peak would flatten the areas.
    assert not series_of(made(8, card=1000 * GIB)).shows_card


def test_areas_have_the_height_of_their_bytes():
    pixels = np.asarray(plot_timeline(made(8), "grows", width=960, height=640)).astype(int)
    colours = {"weights": (0x00, 0x72, 0xB2), "kv_cache": (0xE6, 0x9F, 0x00), "grows": (0x00, 0x9E, 0x73)}
    heights = {name: int((abs(pixels[:, 900] - colour).sum(axis=1) < 12).sum()) for name, colour in colours.items()}
    assert heights["kv_cache"] / heights["weights"] == pytest.approx(7 / 20, rel=0.05)
    assert heights["grows"] / heights["kv_cache"] == pytest.approx(1, rel=0.05)


def test_people_read_blocks_from_1(monkeypatch):
    below, plain = [], ImageDraw.ImageDraw.text

    def text(draw, at, words, **options):
        if options["anchor"] == "ma":
            below.append(words)
        plain(draw, at, words, **options)

    monkeypatch.setattr(ImageDraw.ImageDraw, "text", text)
    timeline = made(6)
    plot_timeline(timeline, "x", width=960, height=640)
    assert below[:7] == ["1", "2", "3", "4", "5", "6", "block"]
    # The record's own block is 3.
    assert "- block 4: prompt changed" in write_table(timeline, judge_growth(timeline))


@pytest.mark.parametrize("blocks", [1, 2, 600])
def test_any_number_of_blocks_can_be_plotted(blocks):
    assert plot_timeline(made(blocks), "x", width=480, height=320).size == (480, 320)
    with pytest.raises(ValueError, match="no whole block"):
        plot_timeline(made(0), "x")
