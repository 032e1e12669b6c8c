"""The accuracy algorithms as options of the pass; each has its own test under quantize/."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from optkit.models import OnnxModel
from optkit.passes import quantize_int8
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.calibration import Calibration
from optkit.quantize.trial import LEAST_GAIN_DB

QUICK = Calibration(method="max", batch_size=8)


def run(step, model, context):
    step.requires(model, context)
    after = step.run(model, context)
    step.ensures(model, after, context)
    return after


def trials(after: OnnxModel):
    return {trial["algorithm"]: trial for trial in after.records["quantization"]["algorithms"]}


@pytest.fixture
def linear(net):
    """A product whose input has channels of very different ranges, and a bias behind it."""
    rng = np.random.default_rng(0)
    return net(
        "g (float[b,6,32] x) => (float[b,6,16] y) { p = MatMul(x, w) a = Add(p, c) y = Relu(a) }",
        w=rng.standard_normal((32, 16)).astype("f"),
        c=rng.standard_normal(16).astype("f"),
    )


@pytest.fixture
def outliers(array_data):
    rng = np.random.default_rng(1)
    return array_data({"x": (rng.standard_normal((64, 6, 32)) * np.geomspace(0.1, 50, 32)).astype("f")})


def test_what_was_tried_is_recorded_with_its_decibels(linear, outliers, context):
    after = run(QuantizeInt8(calibrate=QUICK, round="gptq"), linear, replace(context, data=outliers))
    found = trials(after)
    assert list(found) == ["smooth", "correct_bias", "round"]
    assert found["smooth"]["kept"]
    assert found["smooth"]["sqnr_after"] > found["smooth"]["sqnr_before"] + 1
    for trial in found.values():
        assert trial["kept"] == (trial["sqnr_after"] - trial["sqnr_before"] > LEAST_GAIN_DB - 0.01)  # both are rounded


def test_options_that_are_off_do_nothing(linear, outliers, context):
    off = {"smooth": False, "equalize": False, "round": "nearest", "correct_bias": False}
    plain = QuantizeInt8.model_validate({"activations": "static", "calibrate": QUICK, **off})
    after = run(plain, linear, replace(context, data=outliers))
    assert trials(after) == {}
    assert after.records["ranges"]["samples"] == 64  # nothing is held out where there is nothing to decide


def test_what_does_not_help_is_undone(linear, outliers, context, monkeypatch):
    """A correction with the wrong sign stands for any that makes it worse."""
    data = replace(context, data=outliers)

    def worse(model, quantization, *rest):
        return replace(
            quantization, biases={node.name: np.full(16, 9, "f") for node in model.ir.graph if node.op_type == "Add"}
        )

    plain = run(QuantizeInt8(calibrate=QUICK, correct_bias=False), linear, data)
    monkeypatch.setattr(quantize_int8, "correct_biases", worse)
    after = run(QuantizeInt8(calibrate=QUICK), linear, data)
    assert not trials(after)["correct_bias"]["kept"]
    assert [node.op_type for node in after.ir.graph] == [node.op_type for node in plain.ir.graph]
    for name, value in plain.ir.graph.initializers.items():
        np.testing.assert_array_equal(after.ir.graph.initializers[name].const_value.numpy(), value.const_value.numpy())


def test_channels_are_equalized_and_that_is_recorded(net, array_data, context):
    rng = np.random.default_rng(0)
    sizes = np.geomspace(1, 30, 32, dtype="f")
    model = net(
        "g (float[b,8,6,6] x) => (float[b,16,4,4] y) { a = Conv(x, v) r = Relu(a) y = Conv<pads = [1,1,1,1]>(r, w) }",
        v=rng.standard_normal((32, 8, 3, 3)).astype("f") * sizes[:, None, None, None],
        w=rng.standard_normal((16, 32, 3, 3)).astype("f") / sizes[:, None, None],
    )
    data = array_data({"x": rng.standard_normal((64, 8, 6, 6)).astype("f")})
    after = run(QuantizeInt8(calibrate=QUICK, equalize=True), model, replace(context, data=data))
    found = trials(after)["equalize"]
    assert found["kept"] and found["sqnr_after"] > found["sqnr_before"] + 3
