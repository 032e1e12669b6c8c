from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optkit.quantize.calibration import scales
from optkit.quantize.measure import Judge, decibels, noise_to_signal, outputs_of
from optkit.quantize.observers import observe
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.smooth_quant import smooth
from optkit.targets.base import ORT_CPU, TENSORRT

NORM = """g (float[b,5,32] x) => (float[b,5,24] y, float[b,5,24] z) {
    n = LayerNormalization(x, scale, shift)
    p = MatMul(n, w)
    y = Add(p, c)
    z = MatMul(n, v)
}"""
RESIDUAL = "g (float[b,5,32] x) => (float[b,5,32] y) { n = Gelu(x) p = MatMul(n, w) y = Add(p, n) }"
FLAT = "g (float[b,32] x) => (float[b,16] y) { y = Gemm<transB = 1>(x, w, c) }"


def outliers(rng, *shape):
    """Two channels of the last axis are a hundred times larger than the others."""
    array = rng.standard_normal(shape).astype("f")
    array[..., [3, 17]] *= 100
    return array


@pytest.fixture
def models(net):
    rng = np.random.default_rng(0)

    def weight(*shape):
        return rng.standard_normal(shape).astype("f")

    return {
        "norm": net(NORM, scale=outliers(rng, 32), shift=weight(32), w=weight(32, 24), v=weight(32, 24), c=weight(24)),
        "residual": net(RESIDUAL, w=weight(32, 32)),
        "flat": net(FLAT, w=weight(16, 32), c=weight(16)),
    }


def batches_for(model, array_data):
    rng = np.random.default_rng(1)
    shape = [64, *model.signature.inputs[0].shape[1:]]
    plain = any(node.op_type == "LayerNormalization" for node in model.ir.graph)
    x = rng.standard_normal(shape).astype("f") if plain else outliers(rng, *shape)
    return list(array_data({"x": x}).batches("calibration", 16))


def error(model, batches, policy):
    placement = place(model, policy)
    activations = scales(placement, observe(model, placement.observed, batches), policy, "max")
    quantized = write(
        model, Quantization(placement, activations, quantize_weights(model, placement, policy, activations))
    )
    return decibels(Judge(model, batches, policy, 1).error(quantized))


def ops(model):
    return Counter(node.op_type for node in model.ir.graph)


@pytest.mark.parametrize("policy", [ORT_CPU, TENSORRT], ids=["onnxruntime", "tensorrt"])
@pytest.mark.parametrize(("name", "muls"), [("norm", 0), ("residual", 1), ("flat", 1)])
def test_outliers_move_into_the_weights_and_the_function_stays(models, array_data, name, muls, policy):
    policy = replace(policy, rules=tuple(rule for rule in policy.rules if rule != "head_float"))
    model = models[name]
    name_nodes(model)
    batches = batches_for(model, array_data)
    smoothed = smooth(model, place(model, policy), policy, batches)
    assert smoothed is not model
    assert ops(smoothed) - ops(model) == Counter({"Mul": muls} if muls else {})
    exact = outputs_of(model, batches, 1)
    assert decibels(noise_to_signal(exact, outputs_of(smoothed, batches, 1))) > 110
    assert error(smoothed, batches, policy) > error(model, batches, policy) + 6


def test_a_model_without_outliers_is_left_alone(models, array_data):
    model = models["flat"]
    name_nodes(model)
    x = np.random.default_rng(0).standard_normal((64, 32)).astype("f")
    batches = list(array_data({"x": x}).batches("calibration", 16))
    assert smooth(model, place(model, ORT_CPU), ORT_CPU, batches) is model


def test_dead_channels_stay_finite(models, array_data):
    model = models["flat"]
    name_nodes(model)
    x = outliers(np.random.default_rng(0), 64, 32)
    x[:, 5] = 0
    batches = list(array_data({"x": x}).batches("calibration", 16))
    smoothed = smooth(model, place(model, ORT_CPU), ORT_CPU, batches)
    assert smoothed is not model
    assert all(np.isfinite(v.const_value.numpy()).all() for v in smoothed.ir.graph.initializers.values())


def test_the_input_model_is_not_touched(models, array_data):
    model = models["norm"]
    name_nodes(model)
    before = ir.to_proto(model.ir).SerializeToString()
    smooth(model, place(model, ORT_CPU), ORT_CPU, batches_for(model, array_data))
    assert ir.to_proto(model.ir).SerializeToString() == before
