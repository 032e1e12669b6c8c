from __future__ import annotations

import logging

import hypothesis.extra.numpy as st_numpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optkit.errors import DataError, PassError
from optkit.metrics import Batch
from optkit.quantize.observers import CAPACITY, COUNTED, Observer, observe

values = st_numpy.arrays(np.float32, st.integers(1, 50), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))


def observed(*arrays, channels=False):
    observer = Observer(channels)
    for array in arrays:
        observer.update(array)
    return observer.statistics()


def assert_equal(one, other):
    assert (one.low, one.high, one.exponent, one.start) == (other.low, other.high, other.exponent, other.start)
    assert one.counts.tolist() == other.counts.tolist()


@settings(max_examples=60, deadline=None)
@given(st.lists(values, min_size=1, max_size=5), st.randoms())
def test_neither_order_nor_batching_changes_the_statistics(arrays, random):
    together = observed(np.concatenate(arrays))
    shuffled = random.sample(arrays, len(arrays))
    assert_equal(observed(*shuffled), together)
    assert together.counts.sum() == sum(map(len, arrays))
    assert len(together.counts) <= CAPACITY


@settings(max_examples=60, deadline=None)
@given(values, values)
def test_merging_is_observing_both(one, other):
    assert_equal(observed(one).merge(observed(other)), observed(one, other))


def test_a_growing_range_widens_the_bins_and_keeps_every_count():
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal(1000).astype("f") * 10.0**i for i in range(6)]
    seen = observed(*arrays)
    edges = (seen.start + np.arange(len(seen.counts) + 1)) * seen.width
    expected, _ = np.histogram(np.concatenate(arrays).astype(np.float64), edges)
    assert seen.counts.tolist() == expected.tolist()
    assert CAPACITY / 2 <= len(seen.counts) <= CAPACITY


@pytest.mark.parametrize("value", [0.0, 5.0, -3.25, 1e-38, 3e38])
def test_a_constant_tensor_has_one_bin(value):
    seen = observed(np.full(7, value, np.float32))
    assert seen.counts.tolist() == [7]
    assert seen.low == seen.high == np.float32(value)
    assert seen.centers.tolist() == [np.float32(value)]


def test_zeros_before_values_change_nothing():
    array = np.linspace(-1, 3, 100, dtype=np.float32)
    assert_equal(observed(np.zeros(5, np.float32), array), observed(np.concatenate([array, np.zeros(5, np.float32)])))


def test_a_large_tensor_is_thinned_but_its_range_is_exact():
    array = np.random.default_rng(0).standard_normal(8 * COUNTED).astype("f")
    array[12345] = 100.0
    seen = observed(array)
    assert seen.high == 100.0
    assert COUNTED / 2 < seen.counts.sum() <= COUNTED
    share = seen.counts[seen.centers < 0].sum() / seen.counts.sum()
    assert share == pytest.approx(0.5, abs=0.01)


def test_channels_are_those_of_the_last_axis():
    one, other = np.random.default_rng(0).standard_normal((2, 3, 4, 5)).astype("f")
    seen = observed(one, other, channels=True)
    both = np.concatenate([one, other]).reshape(-1, 5)
    assert np.array_equal(seen.channels, [both.min(axis=0), both.max(axis=0)])


RELU = "g (float[batch,4] x) => (float[batch,4] y) { a = Neg(x) b = Relu(a) y = Exp(b) }"


def batches(*arrays):
    return [Batch({"x": array}, None) for array in arrays]


def test_observes_inputs_inner_tensors_and_outputs(net):
    arrays = np.random.default_rng(0).standard_normal((8, 8, 4)).astype("f")
    seen = observe(net(RELU), ["x", "b", "y"], batches(*arrays))
    assert_equal(seen["x"], observed(*arrays))
    assert_equal(seen["b"], observed(*np.maximum(-arrays, 0)))
    assert seen["y"].high == pytest.approx(np.exp(np.maximum(-arrays, 0)).max(), rel=1e-6)


def test_nan_names_tensor_and_node(net):
    good, bad = np.ones((2, 4), np.float32), np.full((2, 4), -1e3, np.float32)
    model = net(RELU)
    model.ir.graph[2].name = "boom"
    with pytest.raises(PassError, match=r"tensor 'y', the output of node 'boom', is not finite .* after sample 2"):
        observe(model, ["b", "y"], batches(good, bad))


def test_no_samples(net):
    with pytest.raises(DataError, match="calibration split is empty"):
        observe(net(RELU), ["b"], [])


@pytest.mark.parametrize("array", [np.ones((2, 5), np.float32), np.ones((2, 4), np.float64), np.ones(4, np.float32)])
def test_samples_of_another_shape_or_dtype(net, array):
    with pytest.raises(DataError, match=r"the samples do not fit the model: input 'x': float32\[batch,4\] is wanted"):
        observe(net(RELU), ["b"], batches(array))


def test_few_samples_warn(net, caplog):
    with caplog.at_level(logging.WARNING, "optkit.quantize"):
        observe(net(RELU), ["b"], batches(np.ones((31, 4), np.float32)))
    assert "calibrating on 31 samples only" in caplog.text
    caplog.clear()
    observe(net(RELU), ["b"], batches(np.ones((32, 4), np.float32)))
    assert not caplog.records
