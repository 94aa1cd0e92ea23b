"""The estimate against the measured peak."""

import itertools

import pytest
import torch

from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.estimate import check_it_fits, estimate_memory, smaller_choices
from streamblocks.stream.materialise import materialise
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings

pytestmark = pytest.mark.usefixtures("no_pipeline")

FORMATS = {
    "unquantized": None,
    "fp8": QuantizationSpec("fp8"),
    "fp8 with text encoder": QuantizationSpec("fp8", components=("transformer", "text_encoder")),
    "int8": QuantizationSpec("int8", activations="none"),
    "int8 w8a8": QuantizationSpec("int8"),
}


def estimate(recipe, settings, folder, dtype):
    cpu = torch.device("cpu")
    return estimate_memory(
        recipe, settings, model=folder, components=folder, device=cpu, dtype=dtype, vae_dtype=torch.float32
    )


RECOMPUTE = StreamSettings(width=128, height=96, steps=2)
ROLLING = StreamSettings(width=96, height=96, steps=2, kv_policy="rolling", context_frames=6, sink_frames=1)
CASES = {name: (spec, RECOMPUTE) for name, spec in FORMATS.items()} | {"rolling": (None, ROLLING)}


@pytest.mark.parametrize(("spec", "settings"), CASES.values(), ids=CASES.keys())
def test_within_ten_percent_of_the_measured_peak(tiny_folder, spec, settings):
    recipe = Recipe(model=str(tiny_folder), quantization=spec, dtype="bfloat16")
    expected = estimate(recipe, settings, tiny_folder, torch.bfloat16)
    pipeline = materialise(recipe)
    with PeakMeter() as meter, Session(pipeline, settings) as session:
        for _ in range(4):
            session.run_block("a cat")
    assert expected.everything_resident == pytest.approx(meter.peak_bytes, rel=0.10)


def test_what_does_not_fit_is_said_with_figures(tiny_folder):
    settings = StreamSettings(width=160, height=96)
    recipe = Recipe(model=str(tiny_folder))
    asked = estimate(recipe, settings, tiny_folder, torch.float32)
    others = [
        (text, estimate(other, changed, tiny_folder, torch.float32))
        for text, other, changed in itertools.islice(smaller_choices(recipe, settings), 4)
    ]
    assert [text for text, _ in others] == [
        "FP8",
        "FP8 with 2 context frames",
        "FP8 with 1 context frames",
        "FP8 at 80x48",
    ]
    check_it_fits(asked, asked.needed, settings, iter(others))
    free = others[-1][1].needed
    message = rf"at 160x96 needs {asked.needed / 1e9:.1f} GB .* are free: FP8 at 80x48 needs"
    with pytest.raises(MemoryError, match=message):
        check_it_fits(asked, free, settings, iter(others))
    with pytest.raises(MemoryError, match="nothing smaller fits either"):
        check_it_fits(asked, 10, settings, iter(others))


def test_peak_meter_counts_what_is_alive_at_once():
    with PeakMeter() as meter:
        a = torch.zeros(1000)
        b = a[10:].view(-1)
        del a
        c = b + 1
        del b
        d = torch.zeros(10)
    assert meter.peak_bytes == 4000 + 3960
    assert meter.live_bytes == 3960 + 40
    del c, d
    assert meter.live_bytes == 0
