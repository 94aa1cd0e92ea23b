"""The timeline of a stream's memory: stages, owners, and the verdict on growth."""

import json
import re

import pytest
import torch

from streamblocks.memory.growth import fit_slope, judge_growth
from streamblocks.memory.owners import MODULE, OTHER_MODELS, REST, STATE, WEIGHTS, Holders, Owner, OwnerLedger
from streamblocks.memory.readings import MemoryReading
from streamblocks.memory.recorder import BLOCKS_KEPT, TimelineRecorder
from streamblocks.memory.tensor_bytes import live_tensor_bytes, module_bytes
from streamblocks.memory.timeline import BLOCK_END, FORMAT_VERSION, StageRecord, Timeline
from streamblocks.memory.timeline_table import write_table
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.direction import Direction
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import REPOSITORY_BLOCKS, Recipe
from streamblocks.stream.run_stream import run_stream
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.memory_facts import MEMORY_FACTS

from foreign_repository import write_foreign_repository

pytestmark = pytest.mark.usefixtures("no_pipeline", "remote_code_allowed")

CPU = torch.device("cpu")


class Watcher:
    def while_loading(self, component, done, total):
        pass

    def before_pass(self, index):
        pass

    def after_block(self, block):
        pass


def small(**changes):
    return StreamSettings(**({"width": 32, "height": 32, "steps": 1, "seed": 7} | changes))


def record(pipeline, settings, recorder):
    """Stream `settings.blocks` blocks and let the pictures go."""
    with Session(pipeline, settings, recorder=recorder) as session:
        for _ in range(settings.blocks):
            session.run_block("a cat")
    return recorder.timeline()


def leaking_repository(folder, tiny_folder):
    """The foreign pipeline with a decode step that keeps each block's frames in the state."""
    write_foreign_repository(folder, tiny_folder)
    blocks = folder / "blocks.py"
    text = blocks.read_text()
    for old, new in (
        ('InputParam("decoder_cache"),', 'InputParam("decoder_cache"), InputParam("all_frames"),'),
        ('[OutputParam("videos"), ', '[OutputParam("videos"), OutputParam("all_frames"), '),
        (
            "        block.frame_cache_context.extend(",
            "        block.all_frames = [*(block.all_frames or []), video]\n        block.frame_cache_context.extend(",
        ),
    ):
        assert text.count(old) == 1
        text = text.replace(old, new)
    blocks.write_text(text)
    return Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS)


@pytest.mark.parametrize("exact", [True, False], ids=["exact", "by owners"])
def test_a_planted_leak_is_named_with_its_slope(tmp_path, tiny_folder, exact):
    pipeline = materialise(leaking_repository(tmp_path / "leaking", tiny_folder))
    timeline = record(pipeline, small(blocks=6), TimelineRecorder(CPU, exact=exact))
    planted = 12 * 3 * 32 * 32 * 4
    verdict = judge_growth(timeline)
    assert verdict.word == "grows" and verdict.total is not None
    assert verdict.total.bytes == pytest.approx(planted, rel=0.01)
    owner, slope = verdict.owners[0]
    assert (owner.kind, owner.name) == (STATE, "all_frames")
    assert slope.bytes == pytest.approx(planted, rel=0.01)
    assert "'state: all_frames'" in verdict.sentence and "'all_frames = drop'" in verdict.sentence


def test_the_built_in_pipeline_is_flat_over_40_blocks(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    recorder = TimelineRecorder(CPU)
    exact = []
    with Session(pipeline, small(blocks=40), recorder=recorder) as session:
        for index in range(40):
            session.run_block("a cat")
            if index in (5, 39):
                exact.append(live_tensor_bytes("cpu"))
    verdict = judge_growth(recorder.timeline())
    assert verdict.word == "flat", verdict.sentence
    assert verdict.total is not None and (verdict.total.bytes, verdict.total.error) == (0.0, 0.0)
    assert verdict.owners == ()
    # The same by the count of all live tensors, independent of the owners.
    assert exact[0] == exact[1]


@pytest.mark.parametrize("kind", ["float32", "int8", "foreign"])
def test_named_owners_sum_to_all_live_tensors(tmp_path, tiny_folder, kind):
    if kind == "foreign":
        folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
        recipe = Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS)
    else:
        spec = QuantizationSpec("int8", components=("transformer", "text_encoder")) if kind == "int8" else None
        recipe = Recipe(model=str(tiny_folder), quantization=spec)
    before = live_tensor_bytes("cpu")
    pipeline = materialise(recipe)
    timeline = record(pipeline, small(blocks=2), TimelineRecorder(CPU, exact=True))
    for end in timeline.block_ends:
        named = sum(owner.bytes for owner in end.owners if owner.kind != REST)
        # Tensors alive before the stream (constants of libraries) have no owner here.
        assert named == pytest.approx(end.reading.allocated - before, rel=0.01)
        assert sum(owner.bytes for owner in end.owners) == end.reading.allocated
    kinds = {owner.kind for owner in timeline.block_ends[-1].owners}
    assert {WEIGHTS, STATE} <= kinds
    by_name = {owner.name: owner.bytes for owner in timeline.block_ends[-1].owners if owner.kind == WEIGHTS}
    held = sum(size for name, size in by_name.items() if name.startswith("transformer "))
    assert held == module_bytes(pipeline.pipe.transformer)
    assert ("transformer int8" in by_name) == (kind == "int8")


def test_every_stage_has_a_record(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder), quantization=QuantizationSpec("fp8", activations="none")))
    seen: list[StageRecord] = []
    recorder = TimelineRecorder(CPU, facts=MEMORY_FACTS, on_record=seen.append)

    prompts = ["a cat", "a dog"]
    run_stream(
        pipeline,
        small(blocks=2, steps=2, cleanup="every block"),
        Direction(lambda i: prompts[i]),
        [],
        Watcher(),
        recorder,
    )
    timeline = recorder.timeline()
    assert list(timeline.records) == seen
    block = ["refill_context", "prepare_noise", "step 0", "step 1", "denoise_block", "remember_block", "decode"]
    first = [r.stage for r in timeline.stages_of(0)]
    assert first[:5] == ["load text_encoder", "text encode", "load transformer as fp8", "load vae", "bring components"]
    assert first[-9:] == [*block, "clean-up", BLOCK_END]
    second = timeline.stages_of(1)
    assert [r.stage for r in second][-10:] == ["context", *block, "clean-up", BLOCK_END]
    assert [(r.stage, r.event) for r in second if r.event] == [
        ("text encode", "prompt changed"),
        ("clean-up", "cache emptied"),
    ]
    assert all(r.reading.allocated > 0 for r in timeline.records)
    # A stage that is missing in the first block is listed at its place in the last one.
    table = write_table(timeline, judge_growth(timeline))
    rows = [line.split("|")[1].strip() for line in table.splitlines() if line.startswith("| ")]
    assert rows.index("load vae") < rows.index("context") < rows.index("step 0") < rows.index("block end")
    assert timeline.peak == max(r.reading.allocated for r in timeline.records)


def test_nothing_is_hooked_or_kept_without_a_recorder_or_behind_a_stream(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    kinds = [type(block) for block in pipeline.pipe._blocks.sub_blocks.values()]
    with Session(pipeline, small()) as session:
        session.run_block("a cat")
        assert not pipeline.pipe.transformer._forward_hooks
    before = live_tensor_bytes()
    recorder = TimelineRecorder(CPU)
    record(pipeline, small(blocks=3), recorder)
    assert live_tensor_bytes() == before
    assert not pipeline.pipe.transformer._forward_hooks and not pipeline.pipe.transformer._forward_pre_hooks
    assert [type(block) for block in pipeline.pipe._blocks.sub_blocks.values()] == kinds


def test_recording_changes_no_picture(tiny_folder):
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    pictures = []
    for recorder in (None, TimelineRecorder(CPU)):
        with Session(pipeline, small(), recorder=recorder) as session:
            pictures.append(torch.cat([session.run_block("a cat").frames for _ in range(3)]))
    assert torch.equal(*pictures)


def test_json_holds_every_record(tiny_folder):
    timeline = record(materialise(Recipe(model=str(tiny_folder))), small(blocks=2), TimelineRecorder(CPU))
    values = json.loads(timeline.to_json())
    assert (values["version"], values["blocks"], values["device"]) == (FORMAT_VERSION, 2, "cpu")
    assert [(r["stage"], r["block"], r["reading"]["allocated"]) for r in values["records"]] == [
        (r.stage, r.block, r.reading.allocated) for r in timeline.records
    ]
    last = {owner["name"]: owner["bytes"] for owner in values["records"][-1]["owners"]}
    assert last == {owner.name: owner.bytes for owner in timeline.block_ends[-1].owners}


def test_stages_of_a_foreign_pipeline_have_neutral_names(tmp_path, tiny_folder):
    """Its blocks may have the built-in pipeline's names and mean something else."""
    folder = write_foreign_repository(tmp_path / "foreign", tiny_folder)
    blocks = folder / "blocks.py"
    text = blocks.read_text()
    assert text.count('"denoise", "decode"]') == 1
    blocks.write_text(text.replace('"denoise", "decode"]', '"denoise_block", "decode"]'))
    pipeline = materialise(Recipe(model=str(folder), blocks=REPOSITORY_BLOCKS))
    timeline = record(pipeline, small(blocks=1, steps=2), TimelineRecorder(CPU))
    stages = [record.stage for record in timeline.stages_of(0) if record.stage.startswith("denoise")]
    assert stages == ["denoise_block/pass 0", "denoise_block/pass 1", "denoise_block"]


@pytest.mark.parametrize(
    ("options", "said"),
    [({}, "the pipeline's blocks add to this key"), ({"facts": MEMORY_FACTS}, "choose fewer context_frames")],
    ids=["foreign", "built-in"],
)
def test_advice_on_a_key_of_the_state_is_the_pipelines_own(options, said):
    recorder = TimelineRecorder(CPU, **options)
    for index in range(8):
        state = {"frame_cache_context": torch.zeros(100_000 * (index + 1))}
        recorder.begin_block(index, None, state)
        recorder.end_block(state, torch.zeros(0))
    verdict = judge_growth(recorder.timeline())
    assert "'state: frame_cache_context' grows" in verdict.sentence and said in verdict.sentence


def made(held, owners=None, reserved=None):
    """A timeline with these bytes at the ends of its blocks."""
    records = []
    for block, size in enumerate(held):
        named = tuple(Owner(STATE, name, values[block]) for name, values in (owners or {}).items())
        reading = MemoryReading(allocated=size, reserved=None if reserved is None else reserved[block])
        records.append(StageRecord(BLOCK_END, block, float(block), reading, owners=named))
    return Timeline("cuda:0", None, tuple(records), blocks=len(records))


def test_slope_and_error_are_those_of_the_formula():
    slope = fit_slope([0.0, 1.0, 2.0, 3.0], [1.0, 3.0, 2.0, 4.0])
    assert slope.bytes == pytest.approx(0.8)
    # Residuals -0.3, 0.9, -0.9, 0.3: sqrt(1.8 / 2 / 5).
    assert slope.error == pytest.approx((1.8 / 2 / 5) ** 0.5)


def test_a_step_and_noise_are_no_growth_and_too_few_blocks_no_verdict():
    mega = 1 << 20
    assert judge_growth(made([mega] * 3 + [mega + mega * (i > 20) for i in range(40)])).word == "flat"
    noise = [mega, mega + 8192, mega - 4096, mega + 512, mega - 8192, mega + 4096] * 5
    assert judge_growth(made(noise)).word == "flat"
    assert judge_growth(made([mega * i for i in range(5)])).word == "too short"
    # What fills up at the start, as the KV cache does, does not count.
    assert judge_growth(made([0, mega] + [2 * mega] * 10)).word == "flat"


def test_the_fastest_owner_is_named_and_fragmentation_is_told_from_growth():
    mega = 1 << 20
    blocks = range(12)
    owners = {"kv_cache": [mega] * 12, "mine": [mega * i for i in blocks], "small": [4096 * i for i in blocks]}
    verdict = judge_growth(made([10 * mega + (mega + 4096) * i for i in blocks], owners))
    assert [owner.name for owner, _ in verdict.owners] == ["mine", "small"]
    assert "'state: mine' grows by 1.00 MiB (and 1 more)" in verdict.sentence
    reserved = judge_growth(made([mega] * 12, reserved=[mega * (10 + i) for i in blocks]))
    assert reserved.word == "grows" and "expandable_segments" in reserved.sentence


def test_an_endless_stream_keeps_a_bounded_timeline():
    recorder = TimelineRecorder(CPU)
    for index in range(4 * BLOCKS_KEPT):
        recorder.begin_block(index, None, {"grows": torch.zeros(1000 * (index + 1), dtype=torch.int8)})
        recorder.end_block({"grows": torch.zeros(1000 * (index + 1), dtype=torch.int8)}, torch.zeros(0))
    timeline = recorder.timeline()
    assert timeline.blocks == 4 * BLOCKS_KEPT
    assert BLOCKS_KEPT / 2 <= len(timeline.block_ends) <= BLOCKS_KEPT + 1
    # The slope is per block of the stream, not per block recorded.
    assert fit_slope(
        [float(end.block or 0) for end in timeline.block_ends], [end.reading.allocated for end in timeline.block_ends]
    ).bytes == pytest.approx(1000)


def test_a_module_that_keeps_tensors_is_named():
    module = torch.nn.Module()
    module.inner = torch.nn.Linear(4, 4)
    ledger = OwnerLedger("cpu")
    total = 80
    assert ledger.count(Holders({"vae": module}, {}), total)[-1] == Owner(REST, "", 0)
    # Modules are looked through again only when the rest has changed.
    setattr(module.inner, "_feat_map", [None, torch.zeros(8)])  # noqa: B010
    assert ledger.count(Holders({"vae": module}, {}), total + 32) == (
        Owner(WEIGHTS, "vae float32", 80),
        Owner(MODULE, "vae._feat_map", 32),
        Owner(REST, "", 0),
    )
    # ComfyUI's models count separately; tensors shared with the stream's count once.
    other = torch.nn.Linear(2, 2)
    other.bias = module.inner.bias
    counted = ledger.count(Holders({"vae": module}, {}, {OTHER_MODELS: {"Linear 0": other}}), total + 48)
    assert Owner(OTHER_MODELS, "Linear 0", 16) in counted and counted[-1].bytes == 0


def test_out_of_memory_says_what_grew(tmp_path, tiny_folder):
    pipeline = materialise(leaking_repository(tmp_path / "leaking", tiny_folder))

    class FullCard(Watcher):
        def after_block(self, block):
            if block.index == 6:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    report = run_stream(pipeline, small(blocks=9), Direction.constant("a cat"), [], FullCard(), TimelineRecorder(CPU))
    assert report.ran_out and report.blocks_made == 7
    assert re.search(r"at block 8: choose .* 'state: all_frames' grows by 144 KiB", report.notices[-1])
