"""Compile FP8 layers without a graph break, in every scheme; `test_fp8_linear.py` runs this as a program."""

import torch

from streamblocks.benchmarks.quantize_afterwards import make_fp8_linear
from streamblocks.ops import fp8_linear
from streamblocks.ops.quantization import ACTIVATIONS, WEIGHT_GRANULARITIES, QuantizationSpec

X = torch.randn(2, 5, 32).bfloat16()


def layer_of(weights, activations):
    layer = make_fp8_linear(
        torch.randn(48, 32).bfloat16(), torch.randn(48).bfloat16(), QuantizationSpec("fp8", weights, activations)
    )
    if activations == "static":
        layer.input_scale = torch.full((1, 1), 0.01)
        layer._saturate = True
    return layer


def compile_dequantizing(weights, activations):
    for backend in ("eager", "aot_eager"):
        torch.compiler.reset()
        layer = layer_of(weights, activations)
        assert torch.equal(torch.compile(layer, backend=backend, fullgraph=True)(X), layer(X))


def trace_kernel(weights, activations):
    """Tracing is what is tested: the kernel itself takes seconds on a CPU."""
    graphs = []

    def record(graph, inputs):
        graphs.append(graph)
        return lambda *args: (torch.zeros(2, 5, 48, dtype=torch.bfloat16),)

    torch.compiler.reset()
    torch.compile(layer_of(weights, activations), backend=record, fullgraph=True)(X)
    kernels = [node for node in graphs[0].graph.nodes if "_scaled_mm" in str(node.target)]
    assert len(graphs) == 1 and len(kernels) == 1, (weights, activations)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    schemes = [(weights, activations) for weights in WEIGHT_GRANULARITIES for activations in ACTIVATIONS]
    for scheme in schemes:
        compile_dequantizing(*scheme)
    fp8_linear.supports_fp8_matmul = lambda device: True
    for scheme in schemes:
        if scheme[1] != "none":
            trace_kernel(*scheme)
    print("compiled")
