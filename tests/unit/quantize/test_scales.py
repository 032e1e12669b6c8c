from __future__ import annotations

import hypothesis.extra.numpy as st_numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.quantize.observers import Observer
from optkit.quantize.scales import (
    RANGE_METHODS,
    activation_scale,
    quantization_error,
    quantize_weight,
    range_scale,
)

values = st_numpy.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e4, 1e4, width=32))


def observed(array):
    observer = Observer()
    observer.update(array)
    return observer.statistics()


def quantized(array, scale):
    limits = (0, 255) if scale.dtype == "uint8" else (-127, 127)
    stored = np.clip(np.rint(array / scale.scale) + scale.zero_point, *limits)
    return (stored - scale.zero_point) * scale.scale


@settings(max_examples=60, deadline=None)
@given(values, st.booleans(), st.sampled_from(RANGE_METHODS))
def test_every_method_gives_a_usable_scale(array, symmetric, method):
    scale = activation_scale(observed(array), method, symmetric)
    assert scale.dtype == ("int8" if symmetric else "uint8")
    assert np.isfinite(scale.scale)
    assert scale.scale > 0
    assert scale.zero_point == 0 if symmetric else 0 <= scale.zero_point <= 255
    assert quantized(np.zeros(1, np.float32), scale) == 0


@settings(max_examples=60, deadline=None)
@given(values, st.booleans())
def test_max_saturates_nothing(array, symmetric):
    scale = activation_scale(observed(array), "max", symmetric)
    # Half a step for rounding, and half of one for a zero point that had to be rounded
    assert np.abs(quantized(array.astype(np.float64), scale) - array).max() <= 1.01 * float(scale.scale)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", RANGE_METHODS)
@pytest.mark.parametrize("value", [0.0, 5.0, -3.0])
def test_a_constant_tensor_stays_what_it_is(value, method, symmetric):
    array = np.full(9, value, np.float32)
    scale = activation_scale(observed(array), method, symmetric)
    assert quantized(array, scale) == pytest.approx(array, rel=0.01)


@pytest.mark.parametrize("symmetric", [True, False])
def test_mse_has_the_least_error_of_all(symmetric):
    array = np.random.default_rng(0).standard_t(3, 20_000).astype("f")
    errors = {
        method: float(np.square(quantized(array, activation_scale(observed(array), method, symmetric)) - array).mean())
        for method in RANGE_METHODS
    }
    assert min(errors, key=errors.__getitem__) == "mse"
    assert errors["mse"] < errors["max"]


def test_the_error_from_the_histogram_is_the_error_of_the_samples():
    array = np.random.default_rng(0).standard_normal(20_000).astype("f")
    seen = observed(array)
    scale = activation_scale(seen, "mse", False)
    assert quantization_error(seen, scale) == pytest.approx(np.square(quantized(array, scale) - array).mean(), rel=0.05)


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("method", ["percentile", "entropy"])
def test_a_lone_outlier_is_cut_off(method, symmetric):
    array = np.random.default_rng(0).standard_normal(30_000).astype("f")
    array[7] = 1000.0
    scale = activation_scale(observed(array), method, symmetric, percentile=99.99)
    assert scale.range[1] < 100


def test_percentile_keeps_that_share():
    array = np.random.default_rng(0).uniform(-1, 3, 30_000).astype("f")
    low, high = activation_scale(observed(array), "percentile", False, percentile=90).range
    assert (low, high) == pytest.approx((-0.8, 2.8), abs=0.03)


def test_after_relu_zero_is_the_lowest_code():
    array = np.maximum(np.random.default_rng(0).standard_normal(1000), 0).astype("f")
    for method in RANGE_METHODS:
        assert activation_scale(observed(array), method, False).zero_point == 0


@given(st.floats(2.0**-20, 1e6, width=32))
def test_the_range_never_exceeds_what_was_seen(high):
    """So that ONNX Runtime drops the Clip to that bound."""
    scale = range_scale(0.0, high, symmetric=False)
    assert np.float32(scale.scale) * np.float32(255) <= high


@settings(max_examples=60, deadline=None)
@given(
    st_numpy.arrays(
        np.float32, st.tuples(st.integers(1, 5), st.integers(1, 20)), elements=st.floats(-10, 10, width=32)
    ),
    st.sampled_from(["max", "mse"]),
)
def test_weights_are_symmetric_int8_per_channel(weight, method):
    stored = quantize_weight(weight, 0, method)
    assert stored.values.dtype == np.int8
    assert np.abs(stored.values.astype(int)).max() <= 127
    assert stored.scale.shape == (len(weight),)
    assert (stored.scale > 0).all()
    least = quantize_weight(weight, 0, "max").dequantized
    assert np.square(stored.dequantized - weight).sum() <= np.square(least - weight).sum() * (1 + 1e-5) + 1e-12


def test_max_rounds_weights_by_half_a_step_along_any_axis():
    weight = np.random.default_rng(0).standard_normal((6, 4)).astype("f")
    for axis in (0, 1):
        stored = quantize_weight(weight, axis)
        steps = stored.scale.reshape((-1, 1) if axis == 0 else (1, -1))
        assert (np.abs(stored.dequantized - weight) <= 0.5001 * steps).all()


def test_a_dead_channel_gets_a_scale_like_the_others():
    weight = np.random.default_rng(0).standard_normal((3, 8)).astype("f")
    weight[1] = 0
    stored = quantize_weight(weight, 0)
    assert not stored.values[1].any()
    assert stored.scale.min() <= stored.scale[1] <= stored.scale.max()
    assert (quantize_weight(np.zeros((2, 3), np.float32), 0).scale > 0).all()
