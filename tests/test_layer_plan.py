"""Which layers stay under a budget, the estimate that decides it, and what is said when even that is too little."""

from dataclasses import replace

import pytest
import torch
from test_estimate import SmallCard

from streamblocks.families.kv_policies import KV_AUTO, KV_INT8, KV_PLAIN
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.decode_bounds import decoding_notice
from streamblocks.stream.estimate import MemoryEstimate
from streamblocks.stream.layer_plan import LayerPlan, least_bytes, plan_layers
from streamblocks.stream.layer_streaming import streamer_of
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.memory_fit import MemoryFit
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.save_quantized import save_quantized_pipeline
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.stream.streaming_plans import StreamingPlans
from streamblocks.wan.tiny_model import write_tiny_model

pytestmark = pytest.mark.usefixtures("no_pipeline")

# 40 layers of 340 and 600 of other weights, as in the 14B's FP8 (in MB).
LAYERS = [340] * 40
TOTAL = 40 * 340 + 600


@pytest.mark.parametrize(
    ("budget", "streamed"),
    [(None, 0), (TOTAL, 0), (TOTAL - 1, 4), (TOTAL - 340, 4), (TOTAL - 341, 5), (TOTAL - 20 * 340, 23), (1620, 40)],
)
def test_as_many_layers_stay_as_the_budget_allows(budget, streamed):
    plan = plan_layers("transformer", TOTAL, LAYERS, budget)
    assert plan is not None and len(plan.streamed) == streamed
    slots = 3 if streamed else 0
    assert plan.device_bytes == TOTAL - (streamed - slots) * 340 and plan.host_bytes == streamed * 340
    assert budget is None or plan.device_bytes <= budget


def test_less_than_one_layer_at_a_time_is_no_plan():
    assert least_bytes(TOTAL, LAYERS) == 1620
    assert plan_layers("transformer", TOTAL, LAYERS, 1619) is None
    # Three layers in three slots would save nothing.
    assert plan_layers("vae", 100, [30, 30, 30], 99) is None and least_bytes(100, [30, 30, 30]) == 100


def test_a_plan_says_what_it_does():
    plan = plan_layers("text_encoder", TOTAL * 10**6, [size * 10**6 for size in LAYERS], 8 * 10**9)
    assert plan is not None
    assert plan.describe() == (
        "18 of 40 layers of the text encoder stay on the device, 22 are streamed from 7.5 GB of RAM"
    )
    assert LayerPlan("transformer", 40, (), 0, 0).describe() == ""


@pytest.fixture(scope="module")
def deep(tmp_path_factory):
    """The tiny model with 8 layers in transformer and text encoder."""
    return write_tiny_model(tmp_path_factory.mktemp("deep"), layers=8)


def test_a_stream_keeps_to_its_budget_with_the_same_pictures(deep):
    settings = StreamSettings(width=96, height=96, steps=2)

    def stream(pipeline):
        # Without the fused pass, which sums in another order.
        fitted = replace(pipeline.check_fit(settings), fuse_context=False)
        assert fitted == settings
        with Session(pipeline, fitted) as session:
            return torch.cat([session.run_block("waves").frames for _ in range(3)])

    card = SmallCard(10**12)
    pipeline = materialise(Recipe(str(deep)), residency=card)
    assert isinstance(pipeline, BuiltInPipeline)
    expected = stream(pipeline)
    estimate = pipeline.fit.estimate(None, settings)
    assert estimate.least < estimate.needed
    for available in (estimate.least, (estimate.least + estimate.needed) // 2, estimate.needed):
        release_materialised()
        card.available = available
        pipeline = materialise(Recipe(str(deep)), residency=card)
        assert torch.equal(stream(pipeline), expected)
        streamer = streamer_of(pipeline.pipe.transformer)
        assert (streamer is None) == (available == estimate.needed)
        notices = [notice for notice in pipeline.describe()["notices"] if "stay on the device" in notice]
        assert bool(notices) == (available < estimate.needed)
    # Another program comes and goes: so do the layers.
    card.available = estimate.least
    pipeline.check_fit(settings)
    card.available = 10**12
    pipeline.check_fit(settings)
    again = streamer_of(pipeline.pipe.transformer)
    assert again is not None and again.streamed == () and torch.equal(stream(pipeline), expected)


def test_what_streaming_brings_along_is_chosen_by_the_memory(deep):
    """Auto keeps the model's dtype where all layers stay, and packs keys where they do not; what is chosen stays."""
    card = SmallCard(10**12)
    pipeline = materialise(Recipe(str(deep)), residency=card)
    assert isinstance(pipeline, BuiltInPipeline)
    settings = StreamSettings(width=96, height=96, steps=2, kv_format=KV_AUTO)
    assert pipeline.check_fit(settings) == replace(settings, kv_format=KV_PLAIN)
    plain = pipeline.fit.estimate(None, replace(settings, kv_format=KV_PLAIN))
    fused = pipeline.fit.estimate(None, replace(settings, kv_format=KV_INT8, fuse_context=True))
    apart = pipeline.fit.estimate(None, replace(settings, kv_format=KV_INT8))
    assert fused.streaming > apart.streaming
    # 8 layers: the fewest that are worth streaming, 4, are more than a quarter.
    card.available = max(plain.transformer + plain.vae + plain.streaming - 1, fused.least)
    assert pipeline.check_fit(settings) == replace(settings, kv_format=KV_INT8, fuse_context=True)
    card.available = fused.least - 1
    assert pipeline.check_fit(settings) == replace(settings, kv_format=KV_INT8)
    card.available = plain.least
    kept = replace(settings, kv_format=KV_PLAIN)
    assert pipeline.check_fit(kept).kv_format == KV_PLAIN
    # A CPU has no bound.
    release_materialised()
    assert materialise(Recipe(str(deep))).check_fit(settings).kv_format == KV_PLAIN


def bounded_estimate(fit, spec, settings):
    """A stand-in for `MemoryFit.estimate`: a decoder that takes 400, or 100 and its share of the rest."""
    decoding = 100 + 200 // settings.decode_bands + (0 if settings.decoder_cache_in_ram else 100)
    estimate = MemoryEstimate(1000, 0, 0, 0, decoding + settings.fuse_context, transformer_least=500)
    return estimate if fit._residency.streams_layers(fit._device) else estimate.without_streaming()


DECODING = {
    (1, False): "",
    (2, False): "Pictures are decoded in 2 bands of rows: the device has no room for more.",
    (4, False): "Pictures are decoded in 4 bands of rows: the device has no room for more.",
    (
        2,
        True,
    ): "Pictures are decoded in 2 bands of rows, with the decoder's cache in RAM: the device has no room for more.",
    (
        4,
        True,
    ): "Pictures are decoded in 4 bands of rows, with the decoder's cache in RAM: the device has no room for more.",
}


@pytest.mark.parametrize(
    ("available", "bands", "in_ram"),
    [(900, 1, False), (899, 2, False), (800, 2, False), (799, 4, False), (749, 2, True), (799 - 100, 4, True)],
)
def test_where_whole_pictures_do_not_fit_they_are_decoded_in_bands_then_with_the_cache_in_ram(
    deep, monkeypatch, available, bands, in_ram
):
    reserved = []
    monkeypatch.setattr(MemoryFit, "estimate", bounded_estimate)
    monkeypatch.setattr(StreamingPlans, "make", lambda *_, **options: reserved.append(options["reserved"]))
    settings = StreamSettings(width=96, height=96, steps=1)
    pipeline = materialise(Recipe(str(deep)), residency=SmallCard(available))
    assert isinstance(pipeline, BuiltInPipeline)
    chosen = replace(pipeline.check_fit(settings), fuse_context=False)
    assert chosen == replace(settings, decode_bands=bands, decoder_cache_in_ram=in_ram)
    assert decoding_notice(chosen) == DECODING[bands, in_ram]
    assert pipeline.saving.decoding == decoding_notice(chosen)
    assert reserved == [100 if in_ram else 0]


def test_where_the_device_is_the_ram_the_cache_of_the_decoder_stays(deep, monkeypatch):
    monkeypatch.setattr(MemoryFit, "estimate", bounded_estimate)
    monkeypatch.setattr(StreamingPlans, "make", lambda *_, **options: None)
    settings = StreamSettings(width=96, height=96, steps=1)
    card = Ram(1250)
    pipeline = materialise(Recipe(str(deep)), residency=card)
    assert replace(pipeline.check_fit(settings), fuse_context=False) == replace(settings, decode_bands=4)
    card.available = 1249
    with pytest.raises(MemoryError, match="at 96x96 needs at least"):
        pipeline.check_fit(settings)


def test_a_bounded_decoder_makes_the_pictures_of_the_stream(deep):
    settings = StreamSettings(width=32, height=32, steps=1)
    pipeline = materialise(Recipe(str(deep)))
    made = []
    for chosen in (settings, replace(settings, decode_bands=4, decoder_cache_in_ram=True)):
        with Session(pipeline, chosen) as session:
            made.append(torch.cat([session.run_block("waves").frames for _ in range(2)]).int())
    assert (made[0] - made[1]).abs().max() <= 1


def test_a_budget_is_kept_where_more_is_free(deep):
    card = SmallCard(10**12)
    settings = StreamSettings(width=96, height=96, steps=2)
    pipeline = materialise(Recipe(str(deep)), residency=card)
    assert isinstance(pipeline, BuiltInPipeline)
    least = pipeline.fit.estimate(None, settings).least
    enough = StreamSettings(width=96, height=96, steps=2, memory_gb=least / 1e9 + 1e-6)
    pipeline.check_fit(enough)
    assert len(pipeline._plans.transformer.streamed) > 3
    too_small = StreamSettings(width=96, height=96, steps=2, memory_gb=least / 2e9)
    with pytest.raises(MemoryError, match=r"at 96x96 needs at least .*, its layers streamed from RAM"):
        pipeline.check_fit(too_small)


class WatchedCard(SmallCard):
    """Notes what is offloaded."""

    def __init__(self, available):
        super().__init__(available)
        self.offloaded = []

    def offload(self, name, module):
        self.offloaded.append(name)
        super().offload(name, module)


def test_under_a_budget_the_text_encoder_goes_before_the_rest_comes(deep):
    card = WatchedCard(10**12)
    pipeline = materialise(Recipe(str(deep)), residency=card)
    assert isinstance(pipeline, BuiltInPipeline)
    small = StreamSettings(width=96, height=96, steps=1)
    estimate = pipeline.fit.estimate(None, small)
    for bytes_granted, offloaded in ((estimate.needed, ["text_encoder"]), (2 * estimate.needed, [])):
        settings = StreamSettings(width=96, height=96, steps=1, memory_gb=bytes_granted / 1e9 + 1e-6)
        pipeline.check_fit(settings)
        card.offloaded.clear()
        with Session(pipeline, settings) as session:
            session.run_block(f"waves {bytes_granted}")
        assert card.offloaded[:1] == offloaded


@pytest.mark.parametrize("format_", ["fp8", "int8"])
def test_a_transformer_with_streamed_layers_is_saved_as_ever(deep, tmp_path, format_):
    """Loaded where it does not fit, and after a stream; which goes on afterwards."""
    spec = QuantizationSpec(format_, "per tensor" if format_ == "fp8" else "per row")
    recipe = Recipe(str(deep), quantization=spec, dtype="bfloat16")
    whole = materialise(recipe, residency=SmallCard(10**12))
    assert isinstance(whole, BuiltInPipeline)
    save_quantized_pipeline(whole, tmp_path / "whole.safetensors", NoWatcher())
    settings = StreamSettings(width=32, height=32, steps=1)
    with Session(whole, settings) as session:
        expected = session.run_block("waves").frames
    release_materialised()
    component = whole._store.components["transformer"]
    small = SmallCard(least_bytes(component.bytes, component.layer_bytes))
    pipeline = materialise(recipe, residency=small)
    assert isinstance(pipeline, BuiltInPipeline)
    save_quantized_pipeline(pipeline, tmp_path / "streamed.safetensors", NoWatcher())
    streamer = streamer_of(pipeline.pipe.transformer)
    assert streamer is not None and len(streamer.streamed) == 8 and not streamer.is_open
    assert (tmp_path / "streamed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    with Session(pipeline, settings) as session:
        assert torch.equal(session.run_block("waves").frames, expected)
    save_quantized_pipeline(pipeline, tmp_path / "again.safetensors", NoWatcher())
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


class NoWatcher:
    """Watches nothing."""

    def while_loading(self, component, done, total):
        pass

    def while_writing(self, done, total):
        pass


class Ram(SmallCard):
    """A device whose memory is the RAM, as ComfyUI manages it."""

    def streams_layers(self, device):
        return False


def test_where_the_device_is_the_ram_nothing_is_streamed(deep):
    settings = StreamSettings(width=96, height=96, steps=1)
    card = Ram(10**12)
    pipeline = materialise(Recipe(str(deep)), residency=card)
    assert isinstance(pipeline, BuiltInPipeline)
    needed = pipeline.fit.estimate(None, settings).needed
    card.available = needed
    assert pipeline.check_fit(settings) == settings
    card.available = needed // 2
    with pytest.raises(MemoryError, match=r"at 96x96 needs at least [0-9.]+ GB \(weights"):
        pipeline.check_fit(settings)
    with pytest.raises(ValueError, match="memory_gb is 8 and the device is cpu"):
        pipeline.check_fit(replace(settings, memory_gb=8))


def test_a_budget_on_a_cpu_is_refused(deep):
    pipeline = materialise(Recipe(str(deep)))
    with pytest.raises(ValueError, match="memory_gb is 8 and the device is cpu, whose memory is not managed: leave it"):
        pipeline.check_fit(StreamSettings(memory_gb=8))
    with pytest.raises(ValueError, match="memory_gb is -1: give GB"):
        StreamSettings(memory_gb=-1)


@pytest.mark.parametrize("policy", ["recompute", "rolling"])
@pytest.mark.parametrize("failing", [0, 3])
def test_a_block_that_runs_out_of_memory_is_made_again_with_more_layers_streamed(deep, policy, failing):
    """In any pass before decoding, the clean one too, whose keys are in the cache by then: the same pictures."""
    settings = StreamSettings(width=32, height=32, steps=2, kv_policy=policy, context_frames=6, sink_frames=0)

    def stream(pipeline, on_pass):
        pipeline.check_fit(settings)
        with Session(pipeline, settings, on_pass=on_pass) as session:
            return torch.cat([session.run_block("waves").frames for _ in range(4)])

    expected = stream(materialise(Recipe(str(deep)), residency=SmallCard(10**12)), lambda index: None)
    release_materialised()
    pipeline = materialise(Recipe(str(deep)), residency=SmallCard(10**12))
    passes = 0

    def run_out_at(index):
        nonlocal passes
        passes += 1
        # In four tries: cached memory, the text encoder, and twice some layers.
        if 0 <= passes - 1 - failing < 4:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    assert torch.equal(stream(pipeline, run_out_at), expected)
    streamer = streamer_of(pipeline.pipe.transformer)
    assert streamer is not None and len(streamer.streamed) == 5
    assert "3 of 8 layers of the transformer stay on the device" in " ".join(pipeline.describe()["notices"])


def test_a_stream_that_has_no_layers_left_ends(deep):
    settings = StreamSettings(width=32, height=32, steps=1)
    pipeline = materialise(Recipe(str(deep)), residency=SmallCard(10**12))
    pipeline.check_fit(settings)

    def always(index):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with Session(pipeline, settings, on_pass=always) as session, pytest.raises(torch.OutOfMemoryError):
        session.run_block("waves")
    streamer = streamer_of(pipeline.pipe.transformer)
    assert streamer is not None and len(streamer.streamed) == 8
