from __future__ import annotations

from collections import Counter
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.passes.hold_quantizers import HoldQuantizers
from optkit.quantize.calibration import scales
from optkit.quantize.linter import lint
from optkit.quantize.measure import decibels, noise_to_signal, outputs_of
from optkit.quantize.observers import observe
from optkit.quantize.placement import Use, name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.targets.base import ORT_CPU, TENSORRT

# Exact on every processor that these tests may run on
ONNXRUNTIME = replace(ORT_CPU, sums_in_16_bits=True)


def quantization_of(model, data, policy, size=32):
    name_nodes(model)
    placement = place(model, policy)
    statistics = observe(model, placement.observed, data.batches("calibration", size))
    activations = scales(placement, statistics, policy, "max")
    return Quantization(placement, activations, quantize_weights(model, placement, policy, activations))


def sqnr(model, other, data):
    batches = list(data.batches("validation", 32))
    return decibels(noise_to_signal(outputs_of(model, batches, 1), outputs_of(other, batches, 1)))


def optimized_ops(model, tmp_path):
    """What ONNX Runtime really runs."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(ir.to_proto(model.ir).SerializeToString(), options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(tmp_path / "optimized.onnx").graph.node)


@pytest.mark.parametrize("policy", [ONNXRUNTIME, TENSORRT], ids=["onnxruntime", "tensorrt"])
def test_the_quantized_network_is_valid_and_close(residual, images, policy):
    before = ir.to_proto(residual.ir).SerializeToString()
    quantization = quantization_of(residual, images, policy)
    named = ir.to_proto(residual.ir).SerializeToString()
    after = write(residual, quantization)
    assert ir.to_proto(residual.ir).SerializeToString() == named != before  # only the names were given
    onnx.checker.check_model(ir.to_proto(after.ir), full_check=True)
    assert sqnr(residual, after, images) > 30
    assert not [finding for finding in lint(after, policy) if finding.rule != "W5"]


def test_every_convolution_becomes_an_int8_kernel_on_onnx_runtime(residual, images, tmp_path):
    after = write(residual, quantization_of(residual, images, ONNXRUNTIME))
    ops = optimized_ops(after, tmp_path)
    assert (ops["QLinearConv"], ops["QLinearAdd"], ops["QGemm"]) == (6, 2, 1)
    assert not {"Conv", "Gemm", "Add", "Relu", "Clip"} & ops.keys()


def test_clips_disappear_into_the_quantization(net, array_data, tmp_path):
    weight = np.random.default_rng(0).standard_normal((8, 8, 1, 1)).astype("f")
    model = net(
        """g (float[b,8,4,4] x) => (float[b,8,4,4] y) <float zero = {0}, float six = {6}> {
            a = Conv(x, w) ar = Clip(a, zero, six) c = Conv(ar, w) y = Clip(c, zero, six)
        }""",
        w=weight * 5,
    )
    data = array_data({"x": np.random.default_rng(1).standard_normal((40, 8, 4, 4)).astype("f")})
    ops = optimized_ops(write(model, quantization_of(model, data, ONNXRUNTIME)), tmp_path)
    assert ops["QLinearConv"] == 2
    assert "Clip" not in ops


def test_weights_are_stored_as_int8_and_float_ones_are_gone(residual, images):
    after = write(residual, quantization_of(residual, images, ONNXRUNTIME))
    stored = Counter(str(value.dtype) for value in after.ir.graph.initializers.values() if len(value.shape) > 1)
    assert stored == {"INT8": 7}
    assert not any(name in after.ir.graph.initializers for name in ("w0", "b0"))


def test_one_pair_serves_every_quantized_use_and_float_uses_stay(residual, images):
    after = write(residual, quantization_of(residual, images, TENSORRT))
    quantize = Counter(node.inputs[0].name for node in after.ir.graph if node.op_type == "QuantizeLinear")
    assert set(quantize.values()) == {1}
    x1 = next(node.outputs[0] for node in after.ir.graph if node.outputs[0].name == "x1_dequantized")
    assert sorted(use.node.op_type for use in x1.uses()) == ["Conv", "Conv"]
    x0 = next(node.outputs[0] for node in after.ir.graph if node.outputs[0].name == "x0_dequantized")
    assert sorted(use.node.op_type for use in x0.uses()) == ["Add", "Conv"]


def test_a_quantized_output_keeps_its_name(net, array_data):
    model = net(
        "g (float[b,4,4,4] x) => (float[b,4,4,4] y) { y = Conv(x, w) }",
        w=np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype("f"),
    )
    data = array_data({"x": np.random.default_rng(1).standard_normal((40, 4, 4, 4)).astype("f")})
    after = write(model, quantization_of(model, data, ONNXRUNTIME))
    assert [value.name for value in after.ir.graph.outputs] == ["y"]
    assert after.ir.graph.outputs[0].producer().op_type == "DequantizeLinear"
    assert sqnr(model, after, data) > 35


def test_a_dead_channel_with_a_bias_keeps_its_bias(net, array_data):
    weight = np.random.default_rng(0).standard_normal((4, 4, 1, 1)).astype("f")
    weight[1], weight[2] = 0, 1e-20
    bias = np.array([0.5, 2.0, -3.0, 1000.0], np.float32)
    model = net("g (float[b,4,4,4] x) => (float[b,4,4,4] y) { a = Conv(x, w, c) y = Exp(a) }", w=weight, c=bias)
    data = array_data({"x": np.random.default_rng(1).standard_normal((40, 4, 4, 4)).astype("f")})
    quantization = quantization_of(model, data, ONNXRUNTIME)
    after = write(model, quantization)
    (stored,) = (v.const_value.numpy() for n, v in after.ir.graph.initializers.items() if n.endswith("bias_quantized"))
    (unit,) = (v.const_value.numpy() for n, v in after.ir.graph.initializers.items() if n.endswith("bias_scale"))
    assert stored.dtype == np.int32
    assert stored * unit.astype(np.float64) == pytest.approx(bias, rel=1e-3)


@pytest.mark.parametrize("policy", [ONNXRUNTIME, TENSORRT], ids=["onnxruntime", "tensorrt"])
def test_a_corrected_bias_replaces_the_graphs(residual, images, policy):
    quantization = quantization_of(residual, images, policy)
    node = next(use.node for use in quantization.placement.weights)
    (first,) = (n for n in residual.ir.graph if n.name == node)
    shifted = first.inputs[2].const_value.numpy() + 10
    after = write(residual, replace(quantization, biases={node: shifted}))
    assert sqnr(write(residual, quantization), after, images) < 20


def test_concatenated_tensors_get_the_same_scale(net, array_data):
    rng = np.random.default_rng(0)
    model = net(
        """g (float[b,16,4,4] x) => (float[b,16,4,4] y) {
            a = Relu(x) d = Exp(x) c = Concat <axis = 1> (a, d) f = Conv(a, v) g = Conv(c, w) y = Add(f, g)
        }""",
        v=rng.standard_normal((16, 16, 1, 1)).astype("f"),
        w=rng.standard_normal((16, 32, 1, 1)).astype("f"),
    )
    data = array_data({"x": rng.standard_normal((40, 16, 4, 4)).astype("f")})
    quantization = quantization_of(model, data, TENSORRT)
    assert quantization.activations["a"] == quantization.activations["c"]
    assert Use("Conv_4", 1) in quantization.weights or len(quantization.weights) == 2


@pytest.mark.parametrize("dims", ["1,4,16", "n,4,16", "2,3,4,16"])
@pytest.mark.parametrize("corrected", [False, True])
def test_products_with_a_bias_become_int8_kernels_whatever_is_known_of_the_shape(
    net, array_data, tmp_path, dims, corrected
):
    rng = np.random.default_rng(0)
    model = net(
        f"g (float[{dims}] x) => (float[{dims}] y) {{ p = MatMul(x, w) y = Add(p, b) }}",
        w=rng.standard_normal((16, 16)).astype("f"),
        b=rng.standard_normal(16).astype("f"),
    )
    shape = [1 if dim == "n" else int(dim) for dim in dims.split(",")]
    data = array_data({"x": rng.standard_normal((shape[0], *shape[1:])).astype("f")})
    quantization = quantization_of(model, data, ONNXRUNTIME)
    if corrected:
        quantization = replace(quantization, biases={"Add_1": np.arange(16, dtype=np.float32)})
    after = write(model, quantization)
    found = optimized_ops(after, tmp_path)
    assert found == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Add": 1}
    assert not lint(after, ONNXRUNTIME)
    if not corrected:
        assert sqnr(model, after, data) > 30


@pytest.mark.parametrize(
    ("up", "held"),
    [
        ("a = Resize <mode = 'linear'> (r, , two) y = Conv(a, w)", 0),
        ("a = Resize <mode = 'linear'> (r, , one) b = Concat <axis = 1> (a, x) y = Conv(b, v)", 0),
        ("a = Resize <mode = 'linear'> (r, , one) c = Conv(x, w) y = Add(c, a)", 0),
        ("a = Resize <mode = 'linear'> (r, , two) b = Resize <mode = 'cubic'> (a, , two) y = Conv(b, w)", 0),
        ("a = Resize <mode = 'linear'> (r, , two) b = Relu(a) y = Conv(b, w)", 1),
        ("a = Resize <mode = 'linear'> (r, , two) b = Exp(a) c = Conv(a, w) y = Add(b, c)", 1),
        ("a = Resize (r, , two) y = Conv(a, w)", 0),
    ],
)
def test_tensorrt_is_not_kept_from_what_is_placed_for_it(net, array_data, context, up, held):
    model = net(
        f"""g (float[2,16,4,4] x) => (float[2,16,h,v] y)
          <float[4] one = {{1, 1, 1, 1}}, float[4] two = {{1, 1, 2, 2}}> {{ r = Conv(x, w) {up} }}""".replace("'", '"'),
        w=np.random.default_rng(0).standard_normal((16, 16, 1, 1)).astype("f"),
        v=np.random.default_rng(0).standard_normal((16, 32, 1, 1)).astype("f"),
    )
    data = array_data({"x": np.random.default_rng(1).standard_normal((8, 16, 4, 4)).astype("f")})
    after = HoldQuantizers().run(write(model, quantization_of(model, data, TENSORRT, size=2)), context)
    assert [node.op_type for node in after.ir.graph].count("LeakyRelu") == held
