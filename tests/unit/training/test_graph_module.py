from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from operator_cases import CASES, CONSTANTS, INPUTS

from optkit.errors import PreconditionError
from optkit.models import OnnxModel, Signature, TorchModel
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.calibration import Calibration
from optkit.quantize.saturation import MOST, neighbours, pair_reach
from optkit.targets.base import ORT_CPU, TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget, open_onnx
from optkit.targets.pytorch import open_torch
from optkit.training.fake_quantize import STEPS, Scale, Weight
from optkit.training.graph_module import GraphModule
from optkit.training.operators import OPERATORS

QUICK = QuantizeInt8(
    activations="static", calibrate=Calibration(method="max", batch_size=8), smooth=False, correct_bias=False
)

POLICIES = {
    "onnxruntime": ORT_CPU,
    "sums in 16 bits": replace(ORT_CPU, sums_in_16_bits=True),
    "tensorrt": TENSORRT,
}


def quantized(model, data, context, policy=ORT_CPU):
    class Target(OnnxRuntimeTarget):
        @property
        def dialect(self):
            return Dialect(int8=policy)

    return QUICK.run(model, replace(context, data=data, target=Target()))


def graph(body, opset=20):
    """A model of the cases' inputs and constants, whose output has whatever type inference finds."""
    inputs = ", ".join(f"{_type(array)} {name}" for name, array in INPUTS.items())
    proto = onnx.parser.parse_model(
        f'<ir_version: 10, opset_import: ["" : {opset}]> g ({inputs}) => (float z) {{ {body} }}'
    )
    read = sorted({name for node in proto.graph.node for name in node.input if name in CONSTANTS})
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(CONSTANTS[name], name) for name in read)
    proto.graph.output[0].ClearField("type")
    return onnx.shape_inference.infer_shapes(proto, strict_mode=True)


def _type(array):
    name = {"f": "float", "i": "int64", "b": "bool"}[array.dtype.kind]
    return f"{name}[{','.join(map(str, array.shape))}]"


def of(proto):
    return OnnxModel(ir.from_proto(proto), Signature((), ()))


def call(module, feeds):
    with torch.no_grad():
        return [out.numpy() for out in module(*(torch.from_numpy(array) for array in feeds.values()))]


@pytest.mark.parametrize(
    "body", [body for bodies in CASES.values() for body in bodies], ids=lambda body: body.split(" = ", 1)[-1]
)
def test_an_operator_is_what_onnx_runtime_says(body):
    proto = graph(body)
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    (wanted,) = session.run(["z"], INPUTS)
    (given,) = call(GraphModule(of(proto)), INPUTS)
    assert given.dtype == wanted.dtype and given.shape == wanted.shape
    np.testing.assert_allclose(given, wanted, rtol=1e-5, atol=2e-6)


def test_every_operator_has_a_case():
    assert CASES.keys() == OPERATORS.keys()


def test_reductions_of_opset_13_have_their_axes_as_an_attribute():
    proto = graph("z = ReduceMean <axes = [1, -1], keepdims = 0> (x)", opset=13)
    (given,) = call(GraphModule(of(proto)), INPUTS)
    np.testing.assert_allclose(given, INPUTS["x"].mean((1, 3)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("body", "why"),
    [
        ("z = Asinh(x)", r"node 'Asinh_0' \(Asinh\) cannot be trained: there is no Asinh"),
        ("z, q = MaxPool <kernel_shape = [2, 2]> (x) d = Shape(q)", "only the first output of a MaxPool"),
        ('z = ConvTranspose <auto_pad = "SAME_UPPER"> (x, t)', "its output_shape or auto_pad"),
        ("a = Constant <value_int = 1> () z = CumSum <reverse = 1> (x, a)", "its attribute reverse is not known"),
    ],
)
def test_what_it_lacks_is_told_by_operator_and_node(body, why):
    model = of(graph(body))
    for index, node in enumerate(model.ir.graph):
        node.name = f"{node.op_type}_{index}"
    with pytest.raises(PreconditionError, match=why):
        GraphModule(model)


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
def test_a_pair_rounds_and_saturates_as_onnx_runtime_does(net, dtype):
    zero = np.array(100 if dtype == "uint8" else 0, dtype)
    model = net(
        "g (float[n] x) => (float[n] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.37).reshape(()),
        z=zero,
    )
    # Halves of steps, where rounding to even shows, and far beyond both ends
    x = (np.arange(-600, 600, dtype=np.float32) / 2) * np.float32(0.37)
    x = np.concatenate([x, np.random.default_rng(0).uniform(-90, 90, 5000).astype("f")])
    with open_onnx(model, 1, optimize=False) as runner:
        wanted = runner.run({"x": x})["y"]
    assert np.array_equal(call(GraphModule(model), {"x": x})[0], wanted)
    assert len(np.unique(wanted)) == 256


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_a_quantized_network_gives_what_its_graph_gives(residual, images, context, policy, learned):
    model = quantized(residual, images, context, policy)
    module = GraphModule(model, learned=learned, sums_in_16_bits=policy.sums_in_16_bits)
    feeds = next(images.batches("validation", 32)).feeds
    with open_onnx(model, 1, optimize=False) as runner:
        wanted = runner.run(feeds)["logits"]
    given = open_torch(TorchModel(module, model.signature)).run(feeds)["logits"]
    # Float sums in another order may round an inner value the other way, which is less than a step of the output
    assert np.abs(given - wanted).max() < np.ptp(wanted) / 255
    assert np.isclose(given, wanted, atol=1e-5).mean() > 0.5


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_what_was_not_trained_is_stored_as_it_was(residual, images, context, policy, learned):
    model = quantized(residual, images, context, policy)
    arrays = GraphModule(model, learned=learned, sums_in_16_bits=policy.sums_in_16_bits).arrays()
    initializers = model.ir.graph.initializers
    stored = {name: value.const_value.numpy() for name, value in initializers.items()}
    assert all(
        np.array_equal(array, stored[name]) and array.dtype == stored[name].dtype for name, array in arrays.items()
    )
    kept = {name for name in stored if name not in arrays}
    assert all("zero_point" in name or (not learned and "scale" in name) for name in kept - {"w6", "b6"})


def test_weights_and_biases_are_trained_and_other_constants_are_not(net):
    model = net(
        """g (float[n,4] x) => (float[n,4] y) {
            a = MatMul(x, w) b = Add(a, bias) c = LayerNormalization(b, scale, shift) d = Mul(c, factor)
            y = Add(d, mask)
        }""",
        w=np.eye(4, dtype="f"),
        **{name: np.ones(4, "f") for name in ("bias", "scale", "shift", "factor", "mask")},
    )
    module = GraphModule(model)
    names = {name.removeprefix("trained.").removesuffix(".value") for name, _ in module.named_parameters()}
    assert names == {"w", "bias", "scale", "shift"}
    assert module.arrays().keys() == names


def test_gradients_reach_every_weight_bias_and_scale(residual, images, context):
    module = GraphModule(quantized(residual, images, context), learned=True)
    feeds = next(images.batches("validation", 8)).feeds
    module(torch.from_numpy(feeds["image"]))[0].square().sum().backward()
    missing = [name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert not missing


def test_a_scale_has_the_gradient_of_lsq(net):
    model = net(
        "g (float[n] x) => (float[n] y) { q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s, z) }",
        s=np.float32(0.5).reshape(()),
        z=np.array(3, np.uint8),
    )
    module = GraphModule(model, learned=True)
    x = torch.tensor([0.3, 1.1, -0.9, 500.0, -500.0], requires_grad=True)
    module(x)[0].sum().backward()
    assert torch.equal(x.grad, torch.tensor([1.0, 1, 1, 0, 0]))
    inside = sum(round(v / 0.5) - v / 0.5 for v in (0.3, 1.1, -0.9))
    (stretch,) = module.parameters()
    # Of the logarithm in steps, so times the scale / steps; damped by 1 / sqrt(elements * highest)
    assert stretch.grad.item() == pytest.approx(0.5 / STEPS * (inside + 252 - 3) / (5 * 252) ** 0.5, rel=1e-5)


def test_pairs_that_have_the_same_scale_keep_the_same(residual, images, context, net, array_data):
    rng = np.random.default_rng(0)
    model = net(
        """g (float[n,4,8,8] x) => (float[n,4,4,4] y) {
            a = Conv(x, w) b = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (a) y = Conv(b, w)
        }""",
        w=rng.standard_normal((4, 4, 1, 1)).astype("f"),
    )
    data = array_data({"x": rng.standard_normal((32, 4, 8, 8)).astype("f")})
    module = GraphModule(quantized(model, data, context), learned=True)
    before = module.arrays()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("stretch"):
                weight.uniform_(-99, 99)
    after = module.arrays()
    assert before["a_scale"] == before["b_scale"]
    assert after["a_scale"] == after["b_scale"] != before["a_scale"]
    assert after["x_scale"] / before["x_scale"] != after["a_scale"] / before["a_scale"]


def test_a_range_does_not_outgrow_the_clip_that_bounds_it(net, array_data, context):
    rng = np.random.default_rng(0)
    model = net(
        """g (float[n,4,8,8] x) => (float[n,4,8,8] y) {
            low = Constant <value_float = 0.0> () high = Constant <value_float = 1.0> ()
            a = Conv(x, w) b = Clip(a, low, high) y = Conv(b, w)
        }""",
        w=rng.standard_normal((4, 4, 1, 1)).astype("f"),
    )
    data = array_data({"x": rng.standard_normal((32, 4, 8, 8)).astype("f")})
    module = GraphModule(quantized(model, data, context), learned=True)
    before = module.arrays()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if name.endswith("stretch"):
                weight.fill_(0.2 * STEPS)
    after = module.arrays()
    assert after["b_scale"] == before["b_scale"]
    assert after["x_scale"] == pytest.approx(before["x_scale"] * np.exp(0.2))
    module(torch.ones(1, 4, 8, 8))[0].sum().backward()
    assert module.nodes["b_QuantizeLinear"].scale.stretch.grad is not None


@pytest.mark.parametrize(
    ("op", "x", "w"),
    [
        ("Conv <pads = [1, 1, 1, 1]> (x, w)", (2, 6, 9, 9), (8, 6, 3, 3)),
        ("Conv <group = 2> (x, w)", (2, 6, 9, 9), (8, 3, 3, 3)),
        ("Gemm <transB = 1> (x, w)", (2, 33), (8, 33)),
        ("MatMul(x, w)", (2, 33), (33, 8)),
    ],
    ids=["convolution", "grouped", "gemm", "product"],
)
def test_trained_neighbours_never_add_up_to_more_than_fits(net, op, x, w):
    dims = ",".join(map(str, x))
    model = net(f"g (float[{dims}] x) => (float[{','.join('abcd'[: len(x)])}] y) {{ y = {op} }}", w=np.zeros(w, "f"))
    (node,) = model.ir.graph
    stored = np.random.default_rng(0).integers(-127, 128, w).astype(np.int8)
    stored.flat[:4] = 0
    weight = Weight(stored, Scale(np.float32(0.1), learned=False), 0, neighbours(node, w))
    fitting = weight.array()
    assert pair_reach(node, stored.astype(int)).max() > MOST
    assert pair_reach(node, fitting.astype(int)).max() == MOST
    # Only what is in the way gives way, zeros stay, and no sign turns
    assert 0.05 < (stored != fitting).mean() < 0.5
    assert (np.sign(stored) == np.sign(fitting)).all()
    assert np.allclose(weight().detach().numpy(), fitting * np.float32(0.1))
    weight().sum().backward()
    assert (weight.value.grad == weight.scale()).all()


def test_a_copy_trains_apart_and_keeps_shared_scales_shared(residual, images, context):
    module = GraphModule(quantized(residual, images, context), learned=True)
    twin = copy.deepcopy(module)
    assert str(twin) == str(module) and len(list(twin.parameters())) == len(list(module.parameters()))
    with torch.no_grad():
        for weight in twin.parameters():
            weight.add_(0.01)
    arrays, others = module.arrays(), twin.arrays()
    assert not any(np.array_equal(arrays[name], others[name]) for name in arrays if name.endswith("_scale"))
    weights, biases = (next(name for name in others if name.endswith(end)) for end in ("weight_scale", "bias_scale"))
    assert np.array_equal(others[biases], others["image_scale"] * others[weights])


def test_two_graphs_are_told_apart_by_their_text(onnx_model):
    texts = {str(GraphModule(onnx_model(f"g (float[2] x) => (float[2] y) {{ y = {op}(x) }}"))) for op in ("Exp", "Log")}
    assert len(texts) == 2


def test_names_that_modules_have_for_themselves(net):
    model = net(
        "g (float[n,4] x) => (float[n,4] forward) { values = MatMul(x, train) forward = Gemm(values, weight) }",
        train=np.eye(4, dtype="f"),
        weight=np.eye(4, dtype="f"),
    )
    for node, name in zip(model.ir.graph, ("items", "a.b"), strict=True):
        node.name = name
    x = np.ones((2, 4), "f")
    assert np.array_equal(call(GraphModule(model), {"x": x})[0], x)


@pytest.mark.parametrize(
    ("text", "names", "why"),
    [
        ("q = QuantizeLinear(x, s, z) y = DequantizeLinear(q, s2, z)", "s s2 z", "not the other half of a Quantize"),
        (
            "q = QuantizeLinear(x, s, z) f = Cast <to = 1> (q) y = Mul(f, s)",
            "s z",
            "what it writes is read as integers",
        ),
        ("q = QuantizeLinear(x, s4, z4) y = DequantizeLinear(q, s4, z4)", "s4 z4", "an activation needs one scale"),
        ("d = DequantizeLinear(w, s) y = Mul(d, d)", "w s", "it holds no INT8 weight or INT32 bias of one node"),
    ],
)
def test_pairs_that_are_no_pairs(net, text, names, why):
    constants = {
        "s": np.array(1, "f"),
        "s2": np.array(2, "f"),
        "z": np.array(0, np.uint8),
        "s4": np.ones(4, "f"),
        "z4": np.zeros(4, np.uint8),
        "w": np.ones(4, np.int8),
    }
    model = net(f"g (float[n,4] x) => (float[n,4] y) {{ {text} }}", **{name: constants[name] for name in names.split()})
    with pytest.raises(PreconditionError, match=why):
        GraphModule(model)
