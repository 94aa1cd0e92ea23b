"""Every kind of quantized layer through inductor: the compiler rewrites what it takes for a pattern of its own."""

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters

from streamblocks.benchmarks.quantize_afterwards import quantize_layer
from streamblocks.ops.quantization import ACTIVATIONS, WEIGHT_GRANULARITIES, QuantizationSpec

KINDS = [
    (kind, weights, inputs)
    for kind in ("int8", "fp8")
    for weights in WEIGHT_GRANULARITIES
    for inputs in ACTIVATIONS
    if inputs != "static"
]


@pytest.mark.usefixtures("fresh_dynamo")
def test_inductor_leaves_quantized_layers_as_they_are():
    """Weights-only INT8 in bfloat16 was a pattern (`woq_int8`) that inductor failed to compile, on every device."""
    torch.manual_seed(0)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    plain = [nn.Linear(32, 48, dtype=torch.bfloat16, device=device).requires_grad_(False) for _ in KINDS]
    layers = [quantize_layer(one, QuantizationSpec(*kind)) for one, kind in zip(plain, KINDS, strict=True)]
    x = torch.randn(40, 32, device=device).bfloat16()

    def run(x: torch.Tensor) -> list[torch.Tensor]:
        # What comes before is computed in the same kernel, as in a layer of the transformer.
        return [layer(2 * x) for layer in layers]

    compiled = torch.compile(run, fullgraph=True, dynamic=False, options={"max_autotune_gemm_backends": "ATEN"})
    for made, expected in zip(compiled(x), run(x), strict=True):
        assert (made.float() - expected.float()).norm() < 0.01 * expected.float().norm()
    assert not counters["inductor"]["woq_matcher_count"]
