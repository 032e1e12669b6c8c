"""Ranges that are used again: equal results, and a refusal where they belong to something else."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest

from optkit.errors import PreconditionError
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.quantize.calibration import Calibration
from optkit.quantize.ranges import digest
from optkit.recipe import Recipe


@pytest.fixture
def step():
    """Without ``equalize``, which observes some samples anew whenever it is tried."""
    return QuantizeInt8(calibrate=Calibration(samples=64, batch_size=8), equalize=False)


@pytest.fixture
def saved(residual, images, context, step, tmp_path):
    """The quantized model and the file of its ranges."""
    model = step.run(residual, replace(context, data=images))
    file = tmp_path / "ranges.json"
    file.write_text(json.dumps(model.records["ranges"]))
    return model, file


def again(step, file, **changes):
    settings = step.calibrate.model_copy(update={"ranges": str(file), **changes})
    return step.model_copy(update={"calibrate": settings})


def test_ranges_that_fit_make_the_same_model_without_observing(saved, residual, images, context, step, monkeypatch):
    model, file = saved
    observed = []
    monkeypatch.setattr("optkit.passes.quantize_int8.observe", lambda *args: observed.append(args))
    reused = again(step, file).run(residual, replace(context, data=images))
    assert observed == []
    assert ir.to_proto(reused.ir).SerializeToString() == ir.to_proto(model.ir).SerializeToString()
    assert reused.records == model.records


def test_a_bundle_may_stand_for_its_ranges(saved, residual, images, context, step):
    _, file = saved
    assert again(step, file.parent).run(residual, replace(context, data=images)).records["ranges"]


def test_another_model_is_refused(saved, residual, images, context, step):
    _, file = saved
    residual.ir.graph.initializers["w3"].const_value = ir.tensor(np.zeros((32, 16, 3, 3), np.float32))
    with pytest.raises(PreconditionError, match=r"other than what is here: model \(its graph or its weights differ\)"):
        again(step, file).run(residual, replace(context, data=images))


def test_other_samples_are_refused(saved, residual, array_data, context, step):
    _, file = saved
    others = array_data({"image": np.random.default_rng(9).standard_normal((64, 3, 16, 16)).astype("f")})
    others.fingerprint = lambda split: {"source": "elsewhere", "split": split}
    with pytest.raises(PreconditionError, match=r"calibration data \(source arrays there, elsewhere here\)"):
        again(step, file).run(residual, replace(context, data=others))


def test_other_settings_are_refused(saved, residual, images, context, step):
    _, file = saved
    with pytest.raises(PreconditionError, match=r"settings \(method auto there, entropy here; samples 64 there, 32"):
        again(step, file, method="entropy", samples=32).run(residual, replace(context, data=images))


def test_a_tensor_without_a_range_is_refused(saved, residual, images, context, step):
    _, file = saved
    document = json.loads(file.read_text())
    del document["tensors"]["x0"]
    file.write_text(json.dumps(document))
    with pytest.raises(PreconditionError, match="has no range for 'x0'"):
        again(step, file).run(residual, replace(context, data=images))


@pytest.mark.parametrize(
    "content", ["", "[]", '{"tensors": {}}', '{"model": 1, "data": 1, "settings": 1, "tensors": 1}']
)
def test_a_file_that_holds_no_ranges_is_refused(residual, images, context, step, tmp_path, content):
    file = tmp_path / "ranges.json"
    file.write_text(content)
    with pytest.raises(PreconditionError, match=r"holds no ranges that optkit wrote .*; leave calibrate.ranges out"):
        again(step, file).run(residual, replace(context, data=images))
    with pytest.raises(PreconditionError, match="holds no ranges"):
        again(step, tmp_path / "nowhere.json").run(residual, replace(context, data=images))


def test_the_digest_sees_weights_attributes_and_wiring(net):
    w = np.ones((2, 2), np.float32)
    base = "g (float[n,2] x) => (float[n,2] y) { a = MatMul(x, w) y = Softmax <axis = 1> (a) }"
    variants = [
        net(base, w=w),
        net(base, w=2 * w),
        net(base.replace("axis = 1", "axis = 0"), w=w),
        net(base.replace("Softmax <axis = 1>", "Relu"), w=w),
        net(base.replace("MatMul(x, w)", "MatMul(w, x)"), w=w),
    ]
    assert len({digest(model) for model in variants}) == len(variants)
    assert digest(variants[0]) == digest(variants[0].clone())


def test_ranges_are_named_relative_to_the_recipe(tmp_path):
    (tmp_path / "recipe.yaml").write_text("passes: [{use: quantize_int8, calibrate: {ranges: ../old/ranges.json}}]")
    (step,) = Recipe.load(tmp_path / "recipe.yaml").passes
    assert step.calibrate.ranges == str(tmp_path / "../old/ranges.json")
