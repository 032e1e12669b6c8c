from __future__ import annotations

from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import PreconditionError
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.calibration import Calibration
from optkit.quantize.measure import decibels, noise_to_signal, outputs_of
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.sensitivity import JUDGED, sensitivity
from optkit.targets.base import ORT_CPU, TENSORRT, Dialect
from optkit.targets.onnxruntime import OnnxRuntimeTarget

QUICK = Calibration(method="max", batch_size=16)
POLICIES = pytest.mark.parametrize("policy", [ORT_CPU, TENSORRT], ids=["onnxruntime", "tensorrt"])
RNG = np.random.default_rng(3)


class Wants(OnnxRuntimeTarget):
    """ONNX Runtime with any policy."""

    policy: object

    @property
    def dialect(self):
        return Dialect(int8=self.policy)


def rank(model, policy, context, exclude=()):
    """The ranking of plain calibration."""
    step = QuantizeInt8(activations="static", calibrate=QUICK, smooth=False, exclude=tuple(exclude))
    context = replace(context, target=Wants(policy=policy))
    step.requires(model, context)
    return sensitivity(step.calibrated(model, context), context)


def weight(rows, columns):
    return (RNG.standard_normal((rows, columns)) / rows**0.5).astype("f")


@pytest.fixture
def chain(net, array_data):
    """Three products and a head. The second has one large weight in each column, for an input that is small.

    INT8 loses the other weights of the column, and that input.
    """
    arrays = {"w0": weight(32, 32), "w1": weight(32, 32), "w2": weight(32, 32), "w3": weight(32, 32)}
    arrays["w0"][:, 0] /= 200
    arrays["w1"][0] *= 200
    model = net(
        """g (float[batch,32] x) => (float[batch,32] y) {
            a = MatMul(x, w0)  b = Tanh(a)  c = MatMul(b, w1)  d = Tanh(c)  e = MatMul(d, w2)  f = Tanh(e)
            h = MatMul(f, w3)  y = Tanh(h)
        }""",
        **arrays,
    )
    name_nodes(model)
    return model, array_data({"x": np.random.default_rng(4).standard_normal((96, 32)).astype("f")})


@POLICIES
def test_the_layer_that_int8_ruins_comes_first(chain, context, policy):
    model, data = chain
    ranking = rank(model, policy, replace(context, data=data))
    first, second, *_ = ranking.nodes
    assert first.name == model.ir.graph[2].name
    assert first.noise > 0.7 > 0.2 > second.noise
    assert first.sqnr_db < second.sqnr_db - 6
    assert first.sqnr_db == pytest.approx(ranking.sqnr_db, abs=2)
    assert ranking.samples == JUDGED


@POLICIES
def test_every_layer_of_a_network_is_ranked_and_the_network_left_alone(residual, images, context, policy):
    before = ir.to_proto(residual.ir).SerializeToString()
    ranking = rank(residual, policy, replace(context, data=images))
    assert ir.to_proto(residual.ir).SerializeToString() == before
    named = residual.clone()
    name_nodes(named)
    assert {node.name for node in ranking.nodes} == {use.node for use in place(named, policy).weights}
    alone = [node.sqnr_db for node in ranking.nodes]
    assert alone == sorted(alone)
    assert sum(node.noise for node in ranking.nodes) == pytest.approx(1)
    assert 20 < ranking.sqnr_db < alone[0] < 60


def test_a_depthwise_layer_is_ranked_by_its_noise_although_it_would_not_be_int8_alone(net, array_data, context):
    arrays = {"v": (16, 16, 1, 1), "w": (16, 1, 3, 3)}
    model = net(
        "g (float[b,16,8,8] x) => (float[b,16,h,z] y) { e = Conv(x, v) d = Conv <group = 16> (e, w) y = Conv(d, v) }",
        **{name: RNG.standard_normal(shape).astype("f") / 4 for name, shape in arrays.items()},
    )
    data = array_data({"x": RNG.standard_normal((96, 16, 8, 8)).astype("f")})
    ranking = rank(model, TENSORRT, replace(context, data=data))
    assert len(ranking.nodes) == 3
    assert all(node.sqnr_db < 60 for node in ranking.nodes)


@POLICIES
def test_to_exclude_a_layer_only_takes_away(residual, policy):
    name_nodes(residual)
    full = place(residual, policy)
    for use in full.weights:
        placement = place(residual, policy, [use.node])
        assert placement.tensors <= full.tensors
        assert placement.weights.keys() < full.weights.keys()


def test_macs_are_those_of_one_sample(residual, images, context):
    ranking = rank(residual, ORT_CPU, replace(context, data=images))
    macs = {node.name: (node.op, node.macs) for node in ranking.nodes}
    assert macs["Conv_0"] == ("Conv", 16 * 16 * 16 * 3 * 3 * 3)
    assert macs["Conv_7"] == ("Conv", 32 * 8 * 8 * 16 * 3 * 3)
    assert macs["Gemm_15"] == ("Gemm", 32 * 16)


def test_an_only_layer_has_all_the_noise(net, array_data, context):
    model = net("g (float[batch,32] x) => (float[batch,32] y) { a = MatMul(x, w)  y = Tanh(a) }", w=weight(32, 32))
    data = array_data({"x": np.random.default_rng(0).standard_normal((40, 32)).astype("f")})
    ranking = rank(model, ORT_CPU, replace(context, data=data))
    assert [(node.sqnr_db, node.noise) for node in ranking.nodes] == [(ranking.sqnr_db, 1.0)]
    assert ranking.sqnr_db < 60


def test_the_judges_are_held_out_of_the_calibration(chain, context):
    """Samples that only judge may be out of every range that was observed: the error must show that."""
    model, data = chain
    batches = list(data.batches("calibration", 16))
    batches[1].feeds["x"][:] *= 50  # a view: the second batch, which is the one held out
    outliers = rank(model, ORT_CPU, replace(context, data=data))
    batches[1].feeds["x"][:] /= 50
    assert outliers.sqnr_db < rank(model, ORT_CPU, replace(context, data=data)).sqnr_db - 3


@pytest.mark.parametrize("count", [1, 5, 17])
def test_few_samples_do_both(chain, context, array_data, count):
    model, _ = chain
    data = array_data({"x": np.random.default_rng(4).standard_normal((count, 32)).astype("f")})
    ranking = rank(model, ORT_CPU, replace(context, data=data))
    assert ranking.samples == (1 if count == 17 else count)
    assert len(ranking.nodes) == 4


def test_a_fixed_batch_is_kept(net, array_data, context):
    model = net("g (float[4,32] x) => (float[4,32] y) { a = MatMul(x, w)  y = Tanh(a) }", w=weight(32, 32))
    data = array_data({"x": np.random.default_rng(0).standard_normal((39, 32)).astype("f")})
    ranking = rank(model, ORT_CPU, replace(context, data=data))
    assert ranking.samples == 8  # of nine whole batches the second and the sixth are held out
    assert [node.macs for node in ranking.nodes] == [4 * 32 * 32]


def test_what_the_recipe_excludes_is_not_ranked(chain, context):
    model, data = chain
    ruined = str(model.ir.graph[2].name)
    everything = rank(model, ORT_CPU, replace(context, data=data))
    ranking = rank(model, ORT_CPU, replace(context, data=data), exclude=[ruined])
    assert ruined not in [node.name for node in ranking.nodes]
    assert ranking.sqnr_db > everything.sqnr_db + 6


def test_refuses_what_cannot_be_ranked(chain, net, context):
    model, data = chain
    with pytest.raises(PreconditionError, match="needs data"):
        rank(model, ORT_CPU, context)
    labels = net(
        "g (float[batch,32] x) => (int64[batch,1] y) { a = MatMul(x, w) y = ArgMax <axis = 1> (a) }", w=weight(32, 32)
    )
    with pytest.raises(PreconditionError, match="float outputs"):
        rank(labels, ORT_CPU, replace(context, data=data))


def test_the_sqnr_is_that_of_the_quantized_model(net, array_data, context):
    model = net("g (float[batch,32] x) => (float[batch,32] y) { a = MatMul(x, w)  y = Tanh(a) }", w=weight(32, 32))
    data = array_data({"x": np.random.default_rng(0).standard_normal((16, 32)).astype("f")})
    there = replace(context, data=data)
    quantized = QuantizeInt8(calibrate=QUICK, smooth=False, correct_bias=False).run(model, there)
    batches = list(data.batches("calibration", 16))
    measured = decibels(noise_to_signal(outputs_of(model, batches, 1), outputs_of(quantized, batches, 1)))
    ranking = rank(model, there.target.dialect.int8, there)
    assert ranking.sqnr_db == pytest.approx(measured, abs=0.01)
