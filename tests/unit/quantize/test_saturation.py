from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.metrics import Batch
from optkit.models import OnnxModel
from optkit.quantize.calibration import scales
from optkit.quantize.observers import observe
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.saturation import pair_reach
from optkit.targets.base import ORT_CPU
from optkit.targets.onnxruntime import OnnxRuntimeTarget

CAREFUL = replace(ORT_CPU, sums_in_16_bits=True)

GRAPHS = {
    "convolution": ("Conv <pads = [1, 1, 1, 1]> (x, w)", (8, 6, 3, 3), (6, 9, 9)),
    "odd reduction": ("Conv (x, w)", (8, 3, 3, 3), (3, 9, 9)),
    "grouped": ("Conv <group = 2> (x, w)", (8, 3, 3, 3), (6, 9, 9)),
    "pointwise": ("Conv (x, w)", (8, 17, 1, 1), (17, 9, 9)),
    "depthwise": ("Conv <group = 8> (x, w)", (8, 1, 3, 3), (8, 9, 9)),
    "product": ("MatMul(x, w)", (33, 8), (5, 33)),
    "gemm": ("Gemm <transB = 1> (x, w)", (8, 33), (33,)),
}


def outputs(model: OnnxModel, feeds: dict[str, np.ndarray], exact: bool) -> np.ndarray:
    """What ONNX Runtime computes with its fast kernels, or with those that cannot saturate."""
    import onnx_ir as ir
    import onnxruntime as ort

    options = OnnxRuntimeTarget(exact_int8=exact).session_options(threads=1)
    payload = ir.to_proto(model.ir).SerializeToString()
    return ort.InferenceSession(payload, options, providers=["CPUExecutionProvider"]).run(None, feeds)[0]


@pytest.mark.parametrize("kind", GRAPHS)
def test_the_fast_kernels_are_exact_even_on_the_worst_activations(net, kind):
    op, weight_shape, shape = GRAPHS[kind]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal(weight_shape).astype("f")
    weight.flat[::7] *= 4
    dims = ",".join(map(str, shape))
    rank = ",".join("abcd"[: len(shape)])
    model = net(f"g (float[batch,{dims}] x) => (float[batch,{rank}] y) {{ y = {op} }}", w=weight)
    name_nodes(model)
    # Every activation is 0 or 255: a pair that can saturate does
    feeds = {"x": (rng.random((64, *shape)) < 0.8).astype("f")}
    placement = place(model, CAREFUL)
    activations = scales(placement, observe(model, placement.observed, [Batch(feeds, None)]), CAREFUL, "max")
    quantized = write(
        model, Quantization(placement, activations, quantize_weights(model, placement, CAREFUL, activations))
    )
    assert np.array_equal(outputs(quantized, feeds, exact=False), outputs(quantized, feeds, exact=True))


def test_it_costs_less_than_a_bit(net):
    weight = np.random.default_rng(0).standard_normal((64, 512)).astype("f")
    model = net("g (float[b,512] x) => (float[b,64] y) { y = Gemm <transB = 1> (x, w) }", w=weight)
    ratio = pair_reach(model.ir.graph[0], weight) / np.abs(weight).max(axis=1)
    assert (ratio >= 1).all()
    assert ratio.mean() < 1.5
