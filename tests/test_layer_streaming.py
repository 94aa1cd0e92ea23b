"""Layers streamed through slots: the same values, counted copies, and memory that goes back."""

import gc
import weakref

import pytest
import torch
from torch import nn

from streamblocks.benchmarks.quantize_afterwards import quantize_layer
from streamblocks.memory.tensor_bytes import live_tensor_bytes, module_bytes
from streamblocks.ops.fp8_linear import FP8Linear, fp8_scale, largest_magnitude, round_to_fp8
from streamblocks.ops.quantization import QuantizationSpec
from streamblocks.stream.layer_plan import spread_evenly
from streamblocks.stream.layer_streaming import LayerStreamer, streamer_of
from streamblocks.stream.materialise import materialise, release_materialised
from streamblocks.stream.pipelines import BuiltInPipeline
from streamblocks.stream.recipe import Recipe
from streamblocks.stream.residency import move_module
from streamblocks.stream.session import Session
from streamblocks.stream.settings import StreamSettings
from streamblocks.wan.tiny_model import write_tiny_model

from small_wan import make_components

CPU = torch.device("cpu")


def fp8(linear):
    scale = fp8_scale(largest_magnitude(linear.weight, "per row"))
    return FP8Linear(round_to_fp8(linear.weight, scale), scale.view(1, -1), linear.bias, activations="dynamic per row")


def int8(linear):
    return quantize_layer(linear, QuantizationSpec("int8"))


def layer(kind, seed):
    torch.manual_seed(seed)
    plain = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16), nn.LayerNorm(16)).requires_grad_(False)
    if kind == "fp8":
        plain[0], plain[2] = fp8(plain[0]), fp8(plain[2])
    elif kind == "int8":
        plain[0], plain[2] = int8(plain[0]), int8(plain[2])
    elif kind == "bf16":
        plain.to(torch.bfloat16)
    return plain


def layers(kind, count=7):
    return nn.ModuleList([layer(kind, seed) for seed in range(count)])


def run(module, x):
    for one in module:
        x = one(x)
    return x


@pytest.fixture(params=["float32", "bf16", "fp8", "int8"])
def kind(request):
    return request.param


@pytest.fixture
def x(kind):
    torch.manual_seed(100)
    return torch.randn(5, 16, dtype=torch.bfloat16 if kind == "bf16" else torch.float32)


@pytest.mark.parametrize("streamed", [1, 3, 4, 5, 7])
def test_streamed_layers_compute_what_resident_ones_do(kind, x, streamed):
    module = layers(kind)
    expected = run(module, x)
    streamer = LayerStreamer(module, CPU)
    streamer.arrange(spread_evenly(streamed, 7))
    streamer.open()
    for _ in range(3):
        assert torch.equal(run(module, x), expected)


def test_each_pass_copies_what_does_not_stay_in_a_slot(kind, x):
    """5 layers through 3 slots: two slots have two layers each, the third keeps its one."""
    module = layers(kind)
    streamer = LayerStreamer(module, CPU)
    streamer.arrange(range(5))
    streamer.open()
    one = streamer.host_bytes // 5
    assert streamer.slot_bytes == 3 * one and streamer.copied_bytes == 3 * one
    run(module, x)
    first = streamer.copied_bytes
    run(module, x)
    assert streamer.copied_bytes - first == 4 * one
    assert streamer.streamed == (0, 1, 2, 3, 4)


def test_a_layer_called_out_of_order_is_copied_when_it_is_called(kind, x):
    module = layers(kind)
    expected = [one(x) for one in module]
    streamer = LayerStreamer(module, CPU)
    streamer.arrange(range(7))
    streamer.open()
    for index in (6, 0, 3, 3, 5, 1, 2, 4, 0):
        assert torch.equal(module[index](x), expected[index])


def test_a_call_that_fails_leaves_the_next_one_right(x, kind):
    module = layers(kind)
    expected = run(module, x)
    streamer = LayerStreamer(module, CPU)
    streamer.arrange(range(7))
    streamer.open()
    with pytest.raises(RuntimeError):
        run(module[:2], torch.zeros(5, 3, dtype=x.dtype))
    assert torch.equal(run(module, x), expected)


def test_layers_come_and_go_between_runs(kind, x):
    module = layers(kind)
    expected = run(module, x)
    bytes_before = module_bytes(module)
    streamer = LayerStreamer(module, CPU)
    for streamed in ((0, 1, 2, 3, 4), (5, 6), (), (2,), range(7), ()):
        streamer.arrange(streamed)
        assert streamer.is_open == (not streamed)
        streamer.open()
        assert streamer.is_open and torch.equal(run(module, x), expected)
        streamer.close()
        streamer.open()
        assert torch.equal(run(module, x), expected)
    assert streamer.slot_bytes == streamer.host_bytes == 0
    # Each layer is one block now, with gaps of less than the alignment per tensor.
    assert bytes_before <= module_bytes(module) < bytes_before + 7 * 256 * 16


def test_slots_and_blocks_go_without_a_garbage_collection(kind, x):
    gc.collect()
    gc.disable()
    try:
        before = live_tensor_bytes(collect=False)
        module = layers(kind)
        streamer = LayerStreamer(module, CPU)
        streamer.arrange(range(7))
        streamer.open()
        run(module, x)
        gone = weakref.ref(streamer)
        del streamer, module
        assert gone() is None
        assert live_tensor_bytes(collect=False) == before
    finally:
        gc.enable()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return write_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize("format_", [None, "fp8", "int8"])
@pytest.mark.parametrize("streamed", [(1,), (0, 1)])
def test_a_stream_with_streamed_layers_has_the_same_pictures(tiny, format_, streamed):
    """Loaded with layers in ordinary memory, the text encoder's too; and rearranged while it is loaded."""
    spec = None if format_ is None else QuantizationSpec(format_)
    settings = StreamSettings(width=32, height=32, steps=2, kv_policy="rolling")

    def pictures(pipeline):
        with Session(pipeline, settings) as session:
            return torch.cat([session.run_block("waves").frames for _ in range(2)])

    expected = pictures(materialise(Recipe(str(tiny), quantization=spec)))
    release_materialised()
    pipeline = materialise(Recipe(str(tiny), quantization=spec))
    assert isinstance(pipeline, BuiltInPipeline)
    for name in ("transformer", "text_encoder"):
        pipeline._store.stream_layers(name, streamed)
    assert torch.equal(pictures(pipeline), expected)
    streamer, texts = streamer_of(pipeline.pipe.transformer), streamer_of(pipeline.pipe.text_encoder)
    assert streamer is not None and texts is not None
    assert streamer.streamed == texts.streamed == streamed
    whole = pipeline._store.components["transformer"]
    packed = sum(whole.layer_bytes[index] for index in streamed)
    assert packed <= streamer.host_bytes <= packed + 256 * 40 * len(streamed)
    pipeline._store.stream_layers("transformer", ())
    assert torch.equal(pictures(pipeline), expected)
    assert streamer.host_bytes == 0
    pipeline._store.stream_layers("transformer", (0,))
    move_module(pipeline.pipe.transformer, torch.device("meta"))
    assert not streamer.is_open
    release_materialised()


def test_which_layers_are_streamed():
    assert spread_evenly(3, 9) == (1, 4, 7)
    assert spread_evenly(9, 9) == tuple(range(9))
    assert spread_evenly(1, 40) == (20,)
    for streamed in range(1, 41):
        assert len(set(spread_evenly(streamed, 40))) == streamed


def test_a_transformers_parameters_stay_the_same_objects():
    """Compiled graphs and whoever else holds a parameter see the weights of now."""
    transformer = make_components()[0]
    before = dict(transformer.named_parameters())
    values = {name: parameter.clone() for name, parameter in before.items()}
    streamer = LayerStreamer(list(transformer.blocks), CPU, slots=1)
    streamer.arrange(range(len(transformer.blocks)))
    streamer.close()
    after = dict(transformer.named_parameters())
    assert all(after[name] is parameter for name, parameter in before.items())
    assert all(torch.equal(after[name], value) for name, value in values.items())
