"""The register of GPU kernels: why one is not used, the switch, failing once, and the device of a launch."""

import dataclasses
import logging
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention, WanAttnProcessor
from torch._subclasses.fake_tensor import FakeTensorMode

from streamblocks.ops.few_key_attention import attend_to_few_keys, merge_padding
from streamblocks.ops.fp8_linear import QuantizedRows
from streamblocks.ops.head_quantization import HeadScales
from streamblocks.ops.kernels import kernel as kernel_module
from streamblocks.ops.kernels.few_key_launch import FEW_KEY_ATTENTION, FewKeyVariant
from streamblocks.ops.kernels.gelu_quantization_launch import (
    GELU_QUANTIZATION,
    GeluVariant,
    launch_gelu_quantization,
)
from streamblocks.ops.kernels.kernel import ALL, SWITCH_VARIABLE, TRIALS, Kernel, KernelName
from streamblocks.ops.kernels.layer_norm_launch import LAYER_NORM, LayerNormVariant, Residual, RowScaling
from streamblocks.ops.kernels.norm_silu_launch import NORM_SILU, NormVariant
from streamblocks.ops.kernels.register import KERNELS, describe_kernels
from streamblocks.ops.kernels.rotary_store_launch import ROTARY_STORE, ROTARY_STORE_FP8, RotaryVariant
from streamblocks.ops.normed_rows import add_and_norm
from streamblocks.wan.kernel_report import KEYS_NOT_IN_8_BITS, NOT_ASKED_FOR, OTHER_NORMS, OTHER_VAE, report_kernels
from streamblocks.wan.steps.causal_wan_blocks import make_causal_wan_pipeline
from streamblocks.wan.transformer.attention_passes import CausalPass, SelfAttentionPass
from streamblocks.wan.transformer.causal_transformer import (
    allocate_cross_cache,
    allocate_kv_cache,
    fill_cross_cache,
    predict_velocity,
)
from streamblocks.wan.transformer.installed_attention import install_causal_attention
from streamblocks.wan.transformer.rotary_store import Projections, store_block
from streamblocks.wan.vae.norm_silu import PendingSum, norm_into_window

from plain_attention import attend_to_all, pad

CPU, SECOND_CARD = torch.device("cpu"), torch.device("cuda:1")
VARIANTS: dict[Kernel[Any], Any] = {
    NORM_SILU: NormVariant(96, True, True, True, True),
    ROTARY_STORE: RotaryVariant(64, 32),
    ROTARY_STORE_FP8: RotaryVariant(64, 32),
    FEW_KEY_ATTENTION: FewKeyVariant(32),
    GELU_QUANTIZATION: GeluVariant(256),
    LAYER_NORM: LayerNormVariant(256, True, True, False, True),
}
NAMES = [kernel.name.value for kernel in KERNELS]
ON_TWO_CARDS = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@pytest.fixture(autouse=True)
def fresh_trials(monkeypatch):
    monkeypatch.delenv(SWITCH_VARIABLE, raising=False)
    TRIALS.reset()
    yield
    TRIALS.reset()


@pytest.fixture
def cards(monkeypatch):
    """A machine whose CUDA devices have a given compute capability and a Triton that works."""
    capability = {"of all": (9, 0)}
    monkeypatch.setattr(kernel_module, "has_triton", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability["of all"])
    return capability


@pytest.fixture
def any_device(monkeypatch):
    """Let kernels be tried on the CPU, where Triton cannot launch them."""
    monkeypatch.setattr(Kernel, "_refuses_device", lambda self, device: None)


def warnings_of(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]


def test_every_name_is_one_kernel():
    assert sorted(kernel.name for kernel in KERNELS) == sorted(KernelName)


def test_off_cuda_each_kernel_says_so():
    assert describe_kernels(CPU) == dict.fromkeys(NAMES, "needs CUDA, this is cpu")


def test_a_card_runs_all_of_them(cards):
    told = describe_kernels(SECOND_CARD, dtype=torch.bfloat16, vae_dtype=torch.float16, heads=40, head_dim=128)
    assert told == dict.fromkeys(NAMES, "runs")


def test_each_need_is_told(cards):
    whole: dict[str, Any] = {"dtype": torch.bfloat16, "vae_dtype": torch.float16, "heads": 12, "head_dim": 128}

    def told(name, **changed):
        return describe_kernels(SECOND_CARD, **(whole | changed))[name]

    assert told("few_key_attention", head_dim=96) == (
        "needs a head_dim that is a power of two and at least 16, this is 96"
    )
    assert told("few_key_attention", dtype=torch.float32) == "needs bfloat16 or float16, this is float32"
    assert told("norm_silu", vae_dtype=torch.float64) == "needs bfloat16 or float16 or float32, this is float64"
    assert told("rotary_store", head_dim=33) == "needs an even head_dim, this is 33"
    cards["of all"] = (8, 6)
    assert told("gelu_quantization") == "needs compute capability 8.9, cuda:1 has 8.6"
    assert told("norm_silu") == "runs"
    cards["of all"] = (6, 1)
    assert told("norm_silu") == "needs compute capability 7.0, cuda:1 has 6.1"


def test_a_triton_that_does_not_work_is_none(cards, monkeypatch):
    """An importable Triton is not enough: torch asks whether it supports a device."""
    monkeypatch.setattr(kernel_module, "has_triton", lambda: False)
    assert all("triton" in reason for reason in describe_kernels(SECOND_CARD).values())
    assert NORM_SILU.load(SECOND_CARD, torch.float16, VARIANTS[NORM_SILU]) is None


@pytest.mark.parametrize(
    ("value", "off"),
    [(ALL, NAMES), ("norm_silu, Few_Key_Attention", ["norm_silu", "few_key_attention"]), ("", []), (" , ", [])],
)
def test_the_variable_switches_kernels_off(cards, monkeypatch, value, off):
    monkeypatch.setenv(SWITCH_VARIABLE, value)
    told = describe_kernels(SECOND_CARD)
    assert [name for name, reason in told.items() if reason != "runs"] == off
    assert all(SWITCH_VARIABLE in told[name] for name in off)


def test_an_unknown_name_gets_one_warning(cards, monkeypatch, caplog):
    monkeypatch.setenv(SWITCH_VARIABLE, "norm_silu,rope")
    for _ in range(3):
        told = describe_kernels(SECOND_CARD)
    assert told["norm_silu"] != "runs" and told["rotary_store"] == "runs"
    (warning,) = warnings_of(caplog)
    assert "rope" in warning and all(name in warning for name in [*NAMES, ALL, SWITCH_VARIABLE])


@pytest.fixture
def function(monkeypatch):
    """What every kernel's source gives, with Triton or without it."""
    monkeypatch.setattr(Kernel, "source", lambda self: "function")
    return "function"


def made_to(act):
    """A kernel whose trial does `act`, and the list of its trials."""
    tried = []

    def try_out(kernel, *of):
        tried.append(of)
        act()

    return dataclasses.replace(FEW_KEY_ATTENTION, try_out=try_out), tried


def test_one_trial_for_each_device_dtype_and_variant(cards, function):
    kernel, tried = made_to(lambda: None)
    cases = [
        (device, dtype, FewKeyVariant(head_dim))
        for device in (torch.device("cuda:0"), SECOND_CARD)
        for dtype in (torch.bfloat16, torch.float16)
        for head_dim in (64, 128)
    ]
    for case in cases * 3:
        assert kernel.load(*case) == function
    assert tried == cases


def test_a_failing_kernel_is_dropped_with_one_warning(cards, function, caplog):
    def fail():
        raise RuntimeError("ptxas has no idea of this GPU")

    kernel, tried = made_to(fail)
    for head_dim in (64, 64, 128):
        assert kernel.load(SECOND_CARD, torch.bfloat16, FewKeyVariant(head_dim)) is None
    assert len(tried) == 1
    (warning,) = warnings_of(caplog)
    assert "few_key_attention" in warning and "RuntimeError: ptxas has no idea of this GPU" in warning
    assert "ptxas has no idea" in describe_kernels(SECOND_CARD)["few_key_attention"]
    assert describe_kernels(SECOND_CARD)["norm_silu"] == "runs"


def test_a_triton_source_that_cannot_be_imported_drops_its_kernel(cards, caplog):
    kernel = dataclasses.replace(NORM_SILU, function="no_such_triton.add_norm_silu")
    assert kernel.load(SECOND_CARD, torch.float16, VARIANTS[NORM_SILU]) is None
    assert "no_such_triton" in warnings_of(caplog)[0]


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("Triton Error [CUDA]: out of memory")],
    ids=lambda error: type(error).__name__,
)
def test_no_memory_is_no_fault_of_the_kernel(cards, function, caplog, error):
    def fail():
        raise error

    full, _ = made_to(fail)
    with pytest.raises(torch.OutOfMemoryError, match="out of memory"):
        full.load(SECOND_CARD, torch.bfloat16, FewKeyVariant(64))
    assert warnings_of(caplog) == [] and not TRIALS.failed
    later, _ = made_to(lambda: None)
    assert later.load(SECOND_CARD, torch.bfloat16, FewKeyVariant(64)) == function


def test_the_vae_goes_on_with_torch_where_triton_cannot_launch(any_device, caplog):
    pytest.importorskip("triton")

    def compute(**switch):
        draw = torch.Generator().manual_seed(0)
        first, residual, past = (torch.randn(n, 4, 5, 20, generator=draw) for n in (3, 3, 2))
        made = norm_into_window(PendingSum(first, torch.ones(20), residual), torch.ones(20), past, fold=True)
        return first, made.window, made.past

    made, again = compute(), compute()
    with pytest.MonkeyPatch.context() as switch:
        switch.setenv(SWITCH_VARIABLE, ALL)
        expected = compute()
    for tensors in zip(made, again, expected, strict=True):
        assert torch.equal(tensors[0], tensors[2]) and torch.equal(tensors[1], tensors[2])
    (warning,) = warnings_of(caplog)
    assert "norm_silu" in warning


@pytest.fixture(scope="module")
def transformer():
    torch.manual_seed(0)
    made = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=8, freq_dim=16,
        ffn_dim=32, num_layers=2, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
    ).eval().requires_grad_(False)  # fmt: skip
    install_causal_attention(made.bfloat16())
    return made


@pytest.mark.parametrize("compiled", [False, True])
def test_the_transformer_goes_on_with_torch_where_triton_cannot_launch(transformer, any_device, caplog, compiled):
    """The failure shows in the trial, before anything is compiled: a graph never holds a kernel that fails."""
    pytest.importorskip("triton")

    def velocity():
        kv_cache = allocate_kv_cache(transformer, frames=3, latent_height=4, latent_width=6)
        cross_cache = allocate_cross_cache(transformer, text_tokens=512)
        embeds = torch.zeros(1, 512, 8)
        embeds[:, :3] = 1.0
        fill_cross_cache(transformer, cross_cache, embeds, "prompt")
        assert cross_cache.few is not None
        kv_cache.begin_block(18)
        latents = torch.randn((1, 4, 3, 4, 6), generator=torch.Generator().manual_seed(1))
        return predict_velocity(transformer, latents, 500.0, CausalPass(kv_cache, cross_cache, 0))

    with pytest.MonkeyPatch.context() as switch:
        switch.setenv(SWITCH_VARIABLE, ALL)
        expected = velocity()
    try:
        if compiled:
            for block in transformer.blocks:
                block.compile(backend="eager", fullgraph=True, dynamic=False)
        assert torch.equal(velocity(), expected) and torch.equal(velocity(), expected)
    finally:
        for block in transformer.blocks:
            block._compiled_call_impl = None
        torch._dynamo.reset()
    told = warnings_of(caplog)
    assert len(told) == 3 and all(name in "".join(told) for name in ("rotary_store", "few_key_attention", "layer_norm"))


class RecordingKernel:
    """Stands in for a Triton function: notes the device it would be launched on, and those of its tensors."""

    def __init__(self, current):
        self.current, self.launches = current, []

    def __getitem__(self, grid):
        def call(*arguments, **options):
            tensors = {argument.device for argument in arguments if isinstance(argument, torch.Tensor)}
            self.launches.append((list(self.current), tensors))

        return call


@pytest.fixture
def recording(monkeypatch):
    current = []

    @contextmanager
    def device(wanted):
        current.append(wanted)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device", device)
    return RecordingKernel(current)


# Fake tensors have a device and no memory, so no card is needed; torch still queries one if present.
not_with_one_card = pytest.mark.skipif(torch.cuda.device_count() == 1, reason="the only card is cuda:0")


@not_with_one_card
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_each_kernel_is_launched_on_the_device_of_its_tensors(recording, kernel):
    with FakeTensorMode():
        kernel.try_out(recording, SECOND_CARD, torch.bfloat16, VARIANTS[kernel])
    assert recording.launches == [([SECOND_CARD], {SECOND_CARD})]
    assert recording.current == []


@pytest.fixture
def traced(monkeypatch):
    """What torch.compile makes of a call, without a graph break, on tensors of a card; nothing is computed."""
    # Dynamo looks for Triton functions only where they can run.
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: True)

    def targets_in_graph(function, *arguments):
        graphs = []

        def backend(module, inputs):
            graphs.append(module.graph)
            (output,) = module.graph.find_nodes(op="output")
            return lambda *_: [node.meta["example_value"] for node in output.args[0]]

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
        (graph,) = graphs
        return [getattr(node.target, "__name__", str(node.target)) for node in graph.nodes]

    yield targets_in_graph
    torch._dynamo.reset()


def assert_a_launch_alone(targets):
    """The graph has one launch and does not set the current device: inductor does so for the whole graph."""
    assert sum("triton_kernel" in target for target in targets) == 1, targets
    assert not [target for target in targets if "device" in target], targets


@not_with_one_card
def test_a_compiled_layer_holds_a_launch_and_no_break(traced):
    pytest.importorskip("triton")
    with FakeTensorMode():
        draw = lambda *shape: torch.zeros(shape, device=SECOND_CARD)  # noqa: E731
        text, few = draw(1, 512, 2, 32), merge_padding(3, 512, device=SECOND_CARD)
        query, kernel = draw(1, 30, 2, 32), FEW_KEY_ATTENTION.source()
        assert_a_launch_alone(traced(attend_to_few_keys, query, text, text, few, kernel))

        with torch.device("meta"):
            attention = WanAttention(dim=32, heads=2, dim_head=16, processor=WanAttnProcessor())
        for norm in (attention.norm_q, attention.norm_k):
            norm.weight = torch.nn.Parameter(draw(32))
        table, projected = draw(1, 6, 1, 8, 2), Projections(*(draw(1, 6, 32) for _ in range(3)))
        keys, values = draw(1, 9, 2, 16), draw(1, 9, 2, 16)
        bound = SelfAttentionPass(keys, values, 3, None, None, kernel=ROTARY_STORE.source())
        assert_a_launch_alone(traced(store_block, attention, projected, (table, table), bound))
        scales = HeadScales(*(draw(1, 2) for _ in range(3)))
        eight_bits = bound._replace(
            keys=keys.to(torch.float8_e4m3fn),
            values=values.to(torch.float8_e4m3fn),
            kernel=ROTARY_STORE_FP8.source(),
            scales=scales,
            attends_in_8_bits=True,
        )
        assert_a_launch_alone(traced(store_block, attention, projected, (table, table), eight_bits))

        kernel = GELU_QUANTIZATION.source()
        assert_a_launch_alone(traced(launch_gelu_quantization, kernel, draw(4, 256)))

        norm_kernel = LAYER_NORM.source()

        def norm(rows: torch.Tensor, vector: torch.Tensor) -> Any:
            scaling, residual = RowScaling(vector, vector, True, 1e-6), Residual(rows, vector)
            summed, normed = add_and_norm(rows, scaling, residual, quantize=True, kernel=norm_kernel)
            assert isinstance(normed, QuantizedRows)
            return summed, normed.quantized, normed.scale

        assert_a_launch_alone(traced(norm, draw(2, 3, 256), draw(2, 256)))


def test_the_report_of_a_pipeline(cards, transformer):
    pipe = make_causal_wan_pipeline()
    report = report_kernels(pipe, CPU, dtype=torch.float32, vae_dtype=torch.float32, fused_vae=True)
    assert report == dict.fromkeys(NAMES, "needs CUDA, this is cpu")
    pipe.update_components(transformer=transformer)
    dtypes = {"dtype": torch.bfloat16, "vae_dtype": torch.float16}
    report = report_kernels(pipe, SECOND_CARD, **dtypes, fused_vae=True)
    assert report == dict.fromkeys(NAMES, "runs") | {
        "gelu_quantization": NOT_ASKED_FOR,
        "rotary_store_fp8": KEYS_NOT_IN_8_BITS,
    }
    hook = transformer.blocks[1].norm2.register_forward_hook(lambda *call: None)
    of_other_norms = report_kernels(pipe, SECOND_CARD, **dtypes, fused_vae=True)
    hook.remove()
    assert of_other_norms == report | {"layer_norm": OTHER_NORMS}
    of_another_vae = report_kernels(pipe, SECOND_CARD, **dtypes, fused_vae=False)
    assert of_another_vae == report | {"norm_silu": OTHER_VAE}


@ON_TWO_CARDS
@pytest.mark.parametrize("kernel", KERNELS, ids=NAMES)
def test_a_kernel_runs_on_a_card_that_is_not_the_current_one(kernel, caplog):
    torch.cuda.set_device(0)
    dtype = torch.bfloat16
    reason = kernel.why_not(SECOND_CARD, dtype, VARIANTS[kernel])
    if reason is not None:
        pytest.skip(reason)
    assert kernel.load(SECOND_CARD, dtype, VARIANTS[kernel]) is not None, warnings_of(caplog)
    # A launch on the wrong card would fail asynchronously and show only at a synchronisation.
    torch.cuda.synchronize(SECOND_CARD)
    assert torch.cuda.current_device() == 0


@ON_TWO_CARDS
@pytest.mark.parametrize("compiled", [False, True])
def test_attention_on_a_card_that_is_not_the_current_one(compiled):
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    draw = lambda tokens: torch.randn(1, tokens, 5, 128, device=SECOND_CARD, dtype=torch.bfloat16)  # noqa: E731
    query, key, value = draw(1000), pad(draw(512), 32), pad(draw(512), 32)
    few = merge_padding(32, 512, device=SECOND_CARD)
    kernel = FEW_KEY_ATTENTION.load(SECOND_CARD, torch.bfloat16, FewKeyVariant(128))
    assert few is not None and kernel is not None
    attend = torch.compile(attend_to_few_keys, fullgraph=True, dynamic=False) if compiled else attend_to_few_keys
    whole = attend_to_all(query.float(), key.float(), value.float())
    assert (attend(query, key, value, few, kernel).float() - whole).abs().max() < 0.02


@ON_TWO_CARDS
def test_the_vaes_norm_on_a_card_that_is_not_the_current_one():
    torch.cuda.set_device(0)
    torch.manual_seed(0)
    first, residual, past = (torch.randn(n, 13, 17, 96, device=SECOND_CARD, dtype=torch.float16) for n in (4, 4, 2))
    weights = torch.rand(2, 96, device=SECOND_CARD, dtype=torch.float16)

    def window():
        return norm_into_window(PendingSum(first.clone(), weights[0], residual), weights[1], past, fold=True).window

    made = window()
    assert TRIALS.passed, describe_kernels(SECOND_CARD)
    with pytest.MonkeyPatch.context() as switch:
        switch.setenv(SWITCH_VARIABLE, ALL)
        assert (made.float() - window().float()).abs().max() < 0.02
