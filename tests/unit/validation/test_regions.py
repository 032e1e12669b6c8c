"""Regions of INT8 nodes, and their times beside the float twin's."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from optkit.targets.profiling import LayerTime
from optkit.validation.regions import PartTime, Region, RegionTime, _best_run, find_regions, time_regions
from optkit.validation.statistics import Interval

FLOAT = """g (float[1,8,4,4] x) => (float[1,8] y) {
    [first] a = Conv(x, w)
    [first_relu] b = Relu(a)
    [second] c = Conv(b, w)
    [skip] d = Add(c, b)
    [skip_relu] e = Relu(d)
    [soft] s = Sigmoid(e)
    [third] t = Conv(s, w)
    [mean] y = ReduceMean<keepdims=0>(t, axes)
}"""

# The first two convolutions and the third are in INT8; what lies between is not, and the mean reads DQ in float
INT8 = """g (float[1,8,4,4] x) => (float[1,8] y) <float k = {0.1}, int8 z = {0}> {
    [x_Q] xq = QuantizeLinear(x, k, z)
    [x_DQ] xd = DequantizeLinear(xq, k, z)
    [w1_DQ] w1 = DequantizeLinear(q, k, z)
    [first] a = Conv(xd, w1)
    [first_relu] b = Relu(a)
    [b_Q] bq = QuantizeLinear(b, k, z)
    [b_DQ] bd = DequantizeLinear(bq, k, z)
    [w2_DQ] w2 = DequantizeLinear(q, k, z)
    [second] c = Conv(bd, w2)
    [skip] d = Add(c, bd)
    [skip_relu] e = Relu(d)
    [e_Q] eq = QuantizeLinear(e, k, z)
    [e_DQ] ed = DequantizeLinear(eq, k, z)
    [soft] s = Sigmoid(ed)
    [s_smooth] m = Mul(s, k)
    [s_Q] sq = QuantizeLinear(m, k, z)
    [s_DQ] sd = DequantizeLinear(sq, k, z)
    [w3_DQ] w3 = DequantizeLinear(q, k, z)
    [third] t = Conv(sd, w3)
    [t_Q] tq = QuantizeLinear(t, k, z)
    [t_DQ] td = DequantizeLinear(tq, k, z)
    [mean] y = ReduceMean<keepdims=0>(td, axes)
}"""


@pytest.fixture
def models(net):
    axes, kernel = np.array([2, 3]), np.ones((8, 8, 1, 1))
    quantized = net(INT8, q=kernel.astype(np.int8), axes=axes)
    int8 = ["first", "second", "third"]
    return net(FLOAT, w=kernel.astype("f"), axes=axes), quantized.with_record("quantization", {"int8": int8})


def test_what_is_connected_in_int8_is_one_region(models):
    first, second = find_regions(*models)
    assert first.nodes == ("first", "first_relu", "second", "skip", "skip_relu")
    assert first.added == ("x_Q", "x_DQ", "w1_DQ", "b_Q", "b_DQ", "w2_DQ", "e_Q", "e_DQ")
    assert first.name == "first to skip_relu"
    assert second.nodes == ("third",)
    assert second.added == ("s_smooth", "s_Q", "s_DQ", "w3_DQ", "t_Q", "t_DQ")
    assert second.name == "third"
    assert (first.beside, second.beside) == (("soft",), ("soft", "mean"))


def test_a_value_that_also_leaves_in_float_parts_nothing_but_itself(models, net):
    floats, quantized = models
    text = INT8.replace("(float[1,8] y) <", "(float[1,8] y, float[1,8,4,4] e) <")
    given = net(text, q=np.ones((8, 8, 1, 1), np.int8), axes=np.array([2, 3]))
    first = find_regions(floats, given.with_record("quantization", quantized.records["quantization"]))[0]
    assert "skip_relu" not in first.nodes  # its value is an output of the model: no kernel may swallow it


def test_no_int8_no_region(models):
    assert find_regions(models[0], models[0].with_record("quantization", {"int8": []})) == ()


REGIONS = (Region(("a", "b"), ("a_Q",)), Region(("d",), ("d_Q", "d_DQ")))


def layers(**seconds: float) -> list[LayerTime]:
    """A layer for each keyword; its nodes are joined by two underscores."""
    return [LayerTime(name, tuple(name.split("__")), value) for name, value in seconds.items()]


def test_times_are_those_of_all_layers_of_a_region():
    int8 = [layers(a_Q=1, a__b=3, c=9, d_Q=1, d=2, d_DQ=1)] * 6
    twin = [layers(a=4, b=4, c=9, d=2)] * 6
    first, second = time_regions(REGIONS, int8, twin, 0.95, np.random.default_rng(0))
    assert (first.int8, first.twin, first.speedup.estimate, first.speedup.reliable) == (4, 8, 2, True)
    assert first.parts == (PartTime(("a_Q",), 1, 0), PartTime(("a", "b"), 3, 8))
    assert (second.int8, second.twin, second.speedup.estimate) == (4, 2, 0.5)
    assert second.parts == (PartTime(("d_Q",), 1, 0), PartTime(("d",), 2, 2), PartTime(("d_DQ",), 1, 0))


def test_what_one_engine_fuses_into_a_region_counts_in_both():
    int8 = [layers(a_Q=1, a__b=3, c=2, d=2, d_Q=1)] * 6
    twin = [layers(a=4, b__c=5, d=2)] * 6  # c is fused here, so its kernel there is the region's too
    first, _ = time_regions(REGIONS, int8, twin, 0.95, np.random.default_rng(0))
    assert first.parts == (PartTime(("a_Q",), 1, 0), PartTime(("a", "b", "c"), 5, 9))
    assert first.speedup.estimate == 9 / 6


def test_a_layer_of_two_regions_counts_once():
    int8 = [layers(a__b__d=6, d_Q=1)] * 6
    twin = [layers(a=1, b=1, d=1)] * 6
    first, second = time_regions(REGIONS, int8, twin, 0.95, np.random.default_rng(0))
    assert (first.int8, second.int8) == (6, 1)


def test_copies_beside_a_region_count_in_both():
    """TensorRT copied what an INT8 convolution of EfficientNet-B0 wrote for the SiLU behind it (on an H200)."""
    region = Region(("conv",), ("conv_Q",), ("gate", "silu"))
    copies = [LayerTime("in", ("conv",), 1, True), LayerTime("behind", ("gate", "silu"), 3, True)]
    int8 = [[*layers(conv=2, gate__silu=5), *copies, LayerTime("far", ("other",), 7, True)]] * 6
    twin = [[*layers(conv=4, gate__silu=5), LayerTime("behind", ("gate", "silu"), 1, True)]] * 6
    (found,) = time_regions([region], int8, twin, 0.95, np.random.default_rng(0))
    assert found.parts == (PartTime(("conv",), 3, 4), PartTime(("gate", "silu"), 3, 1))
    assert found.losing == ("conv",)  # what it gains, the copy behind it costs twice


def test_a_region_that_no_layer_tells_of_is_left_out():
    (only,) = time_regions(REGIONS, [layers(a=1, d=2)] * 6, [layers(a=1, x=1)] * 6, 0.95, np.random.default_rng(0))
    assert only.region.nodes == ("a", "b")


def test_the_interval_is_over_rounds():
    int8 = [layers(a=seconds) for seconds in (1.0, 1.1, 0.9, 1.0, 1.2, 0.8)]
    (few,) = time_regions(REGIONS[:1], int8[:3], [layers(a=1)] * 3, 0.95, np.random.default_rng(0))
    (enough,) = time_regions(REGIONS[:1], int8, [layers(a=1)] * 6, 0.95, np.random.default_rng(0))
    assert not few.speedup.reliable
    assert enough.speedup.low < 1 < enough.speedup.high
    assert enough.int8 == 1.0  # the median of the rounds


def timed(conversions: float, *parts: tuple[float, float]) -> RegionTime:
    """A region of a node for each part, with its times in INT8 and in the twin."""
    names = [f"n{index}" for index in range(len(parts))]
    made = [PartTime((name, f"{name}_DQ"), *seconds) for name, seconds in zip(names, parts, strict=True)]
    unknown = Interval(1, 0, 2, "", 6)
    return RegionTime(Region(tuple(names), ("q",)), (PartTime(("q",), conversions, 0), *reversed(made)), unknown)


@pytest.mark.parametrize(
    ("conversions", "parts", "losing"),
    [
        (1, [(3, 5)], []),
        (2, [(3, 5)], [0]),  # entering and leaving INT8 costs what it gains
        (1, [(9, 5), (6, 5), (3, 9), (5, 4), (3, 9), (9, 5)], [0, 1, 5]),  # the loss in the middle is worth the way
        (1, [(1, 4), (9, 1), (1, 9)], [0, 1]),  # and here it is not
        (1, [(5, 4), (5, 5)], [0, 1]),
    ],
)
def test_the_run_of_parts_that_gains_the_most_stays(conversions, parts, losing):
    assert timed(conversions, *parts).losing == tuple(f"n{index}" for index in losing)


@given(st.lists(st.integers(-9, 9), max_size=12))
def test_no_run_gains_more_than_the_best(gains):
    start, stop = _best_run(gains)
    runs = [sum(gains[i:j]) for i in range(len(gains)) for j in range(i, len(gains) + 1)]
    assert sum(gains[start:stop]) == max([0, *runs])
