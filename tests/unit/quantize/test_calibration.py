from __future__ import annotations

import math

import pytest

from optkit.quantize.calibration import Calibration, least_clipping


@pytest.mark.parametrize(
    ("sqnr", "chosen"),
    [
        ((13.65, 13.96, 14.16, 14.23), "percentile 99.999"),  # EfficientNet-Lite0: 99.99 lost 5 dB on other photographs
        ((14.00, 14.00, 14.00, 14.00), "max"),
        ((10.65, 15.90, 15.00, 14.00), "percentile 99.999"),
        ((10.00, 12.00, 18.00, 17.90), "mse"),
        ((-math.inf, -math.inf, -math.inf, 3.00), "percentile 99.99"),
    ],
)
def test_the_method_that_clips_least_of_those_that_are_as_good(sqnr, chosen):
    names = ("max", "percentile 99.999", "mse", "percentile 99.99")
    assert least_clipping(list(zip(names, sqnr, strict=True))) == chosen


def test_candidates_are_in_the_order_of_how_much_they_clip():
    assert [method for method, _ in Calibration().candidates()] == ["max", "percentile", "mse", "percentile", "entropy"]
    assert Calibration(method="mse").candidates() == (("mse", 99.999),)
