"""The estimate against the measured peak."""

import itertools
from dataclasses import replace

import pytest
import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.modular_pipelines import PipelineState
from emulated_flash3 import emulated_flash3

from streamblocks.checkpoints.json_text import read_json
from streamblocks.families.model_family import AttentionChoice, ComponentOptions, ModelSources
from streamblocks.memory.peak_meter import PeakMeter
from streamblocks.ops.attention_backends import EIGHT_BIT
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.estimate import check_it_fits, estimate_memory, smaller_choices
from streamblocks.stream.known_families import recognise_family
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import PlainResidency
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.checkpoints.components import transformer_component
from streamblocks.wan.checkpoints.quantized_checkpoint import save_quantized_transformer
from streamblocks.wan.rehearsal import bytes_per_score

pytestmark = pytest.mark.usefixtures("no_pipeline")

NATIVE = AttentionChoice()
CPU = torch.device("cpu")
FORMATS = {
    "unquantized": None,
    "fp8": QuantizationSpec("fp8"),
    "fp8 with text encoder": QuantizationSpec("fp8", components=("transformer", "text_encoder")),
    "int8": QuantizationSpec("int8", activations="none"),
    "int8 w8a8": QuantizationSpec("int8"),
}


def estimate(folder, settings, dtype, spec=None, attention=NATIVE):
    options = ComponentOptions(dtype, torch.float32, spec, attention)
    family = recognise_family(folder)
    components = family.components(ModelSources.in_folder(folder), options)
    return estimate_memory(family, components, settings, attention, torch.device("cpu"))


RECOMPUTE = StreamSettings(width=128, height=96, steps=2)
ROLLING = StreamSettings(width=96, height=96, steps=2, kv_policy="rolling", context_frames=6, sink_frames=1)
CASES = {name: ("tiny_folder", spec, RECOMPUTE) for name, spec in FORMATS.items()} | {
    "rolling": ("tiny_folder", None, ROLLING),
    # As many tokens as above, so that the stream needs more than encoding the prompt.
    "recompute of the second family": ("tiny_folder_22", None, replace(RECOMPUTE, width=256, height=192)),
    "rolling of the second family": ("tiny_folder_22", None, replace(ROLLING, width=192, height=192)),
}


@pytest.mark.parametrize(("folder", "spec", "settings"), CASES.values(), ids=CASES.keys())
def test_within_ten_percent_of_the_measured_peak(request, folder, spec, settings):
    """What `check_fit` compares with the card: the larger of encoding the prompt and, without its encoder, the rest."""
    tiny_folder = request.getfixturevalue(folder)
    recipe = Recipe(model=str(tiny_folder), quantization=spec, dtype="bfloat16")
    expected = estimate(tiny_folder, settings, torch.bfloat16, spec)
    pipeline = materialise(recipe)
    with PeakMeter() as encoding:
        pipeline.encode_prompt(PipelineState(), "a cat")
    # Only what is made from here on counts; the text encoder's weights are loaded already.
    with PeakMeter() as streaming, Session(pipeline, settings) as session:
        for _ in range(4):
            session.run_block("a cat")
    assert expected.needed == pytest.approx(max(encoding.peak_bytes, streaming.peak_bytes), rel=0.10)
    assert expected.text_encoder + expected.text_encoding == pytest.approx(encoding.peak_bytes, rel=0.15)
    # Encoding the prompt again, with the encoder loaded, needs less than streaming.
    others = expected.transformer + expected.vae + expected.streaming
    assert others == pytest.approx(streaming.peak_bytes, rel=0.10)


def test_the_bytes_per_score_are_those_that_are_held():
    """In a call whose scores are far larger than its inputs and outputs."""
    query, key = torch.randn(1, 512, 2, 16), torch.randn(1, 4096, 2, 16)
    for backend in ("_native_math", "native"):
        with torch.no_grad(), PeakMeter() as meter:
            dispatch_attention_fn(query, key, key, backend=backend)
        held = meter.peak_bytes / (2 * 512 * 4096)
        counted = bytes_per_score(AttentionChoice(backend))
        assert counted * 0.8 <= held + 0.5 and held <= counted + 0.5


def test_only_eager_flex_attention_holds_scores(tiny_folder):
    settings = StreamSettings(width=1280, height=768, steps=1, context_frames=3)
    native, eager, compiled = (
        estimate(tiny_folder, settings, torch.bfloat16, attention=choice).streaming
        for choice in (NATIVE, AttentionChoice("flex"), AttentionChoice("flex", compiled=True))
    )
    assert compiled == native
    # 2 heads; a block attends to itself and to the context. Without the scores, decoding is what holds most.
    scores = 2 * (3 * 3840) * (6 * 3840)
    assert native < eager == pytest.approx(bytes_per_score(AttentionChoice("flex")) * scores, rel=0.25)


def test_a_long_past_is_rehearsed_with_its_window_full(tiny_folder):
    """Most of this stream's memory is its context's pictures, which a few blocks would not fill."""
    settings = StreamSettings(width=64, height=64, steps=1, context_frames=30)
    pipeline = materialise(Recipe(model=str(tiny_folder)))
    pipeline.encode_prompt(PipelineState(), "a cat")
    with PeakMeter() as meter, Session(pipeline, settings) as session:
        for _ in range(12):
            session.run_block("a cat")
    expected = estimate(tiny_folder, settings, torch.float32)
    pictures = (1 + 29 * 4) * 3 * 64 * 64 * 4
    assert expected.streaming > pictures > 0.4 * expected.streaming
    made = expected.transformer + expected.vae + expected.streaming
    assert made == pytest.approx(meter.peak_bytes, rel=0.05)


def test_what_does_not_fit_is_said_with_figures(tiny_folder):
    settings = StreamSettings(width=160, height=96)
    asked = estimate(tiny_folder, settings, torch.float32)
    choices = smaller_choices(None, settings, can_quantize=True, size_step=16)
    others = [
        (text, estimate(tiny_folder, changed, torch.float32, spec))
        for text, spec, changed in itertools.islice(choices, 4)
    ]
    assert [text for text, _ in others] == [
        "FP8",
        "FP8 with 2 context frames",
        "FP8 with 1 context frames",
        "FP8 at 80x48",
    ]
    check_it_fits(asked, asked.needed, settings, iter(others))
    free = others[-1][1].needed
    message = rf"at 160x96 needs at least {asked.least / 1e9:.1f} GB.* are free: FP8 at 80x48 needs"
    with pytest.raises(MemoryError, match=message):
        check_it_fits(asked, free, settings, iter(others))
    with pytest.raises(MemoryError, match="nothing smaller fits either"):
        check_it_fits(asked, 10, settings, iter(others))


class SmallCard(PlainResidency):
    """A device with a given number of bytes."""

    def __init__(self, available):
        super().__init__()
        self.available = available

    def available_bytes(self, device):
        return self.available


@pytest.mark.parametrize("weights", ["fp8", "int8"])
def test_a_stored_file_that_does_not_fit_is_told_what_would(tiny_folder, tmp_path, weights):
    """The error does not say that it is already quantized: no quantization was requested."""
    spec = QuantizationSpec(weights, "per tensor" if weights == "fp8" else "per row")
    transformer = transformer_component(tiny_folder, dtype=torch.bfloat16, quantization=spec).load("cpu")
    file = save_quantized_transformer(transformer, tmp_path / "stored.safetensors")
    settings = StreamSettings(width=320, height=192)
    recipe = Recipe(model=str(file), components=str(tiny_folder))
    enough = materialise(recipe, residency=SmallCard(10**12))
    enough.check_fit(settings)
    release_materialised()
    least = replace(settings, decode_bands=4, decoder_cache_in_ram=True)
    asked = estimate(tiny_folder, least, torch.float32, spec).needed
    with pytest.raises(MemoryError, match=r"are free: (with|at) .* needs") as told:
        materialise(recipe, residency=SmallCard(asked - 10**5)).check_fit(settings)
    assert "FP8" not in str(told.value)


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


def test_keys_in_8_bits_are_counted_as_such(tiny_folder):
    """Where the library runs on the stream's device, and reads them without a bias on them."""
    settings = StreamSettings(width=32, height=32, steps=1, kv_policy="rolling")

    def counted(device, **changes):
        changed = replace(settings, **changes)
        return estimate(tiny_folder, changed, torch.bfloat16, attention=AttentionChoice(EIGHT_BIT, device=device))

    with emulated_flash3():
        wide, narrow, biased = counted(None), counted(CPU), counted(CPU, attention_bias=0.5)
    config = read_json(tiny_folder / "transformer" / "config.json")
    layers, heads = config["num_layers"], config["num_attention_heads"]
    # Keys and values of 6 latent frames of 4 tokens: one byte less of each, and three scales of each head more.
    numbers = 2 * 6 * 4 * heads * config["attention_head_dim"]
    assert wide.streaming - narrow.streaming == layers * (numbers - 3 * 4 * heads)
    assert biased.streaming == wide.streaming
