from __future__ import annotations

import numpy as np
import pytest

from optkit.quantize.measure import Judge
from optkit.targets.base import TENSORRT

SHIFTED = "g (float[b,4] x) => (float[b,4] y) <float[4] by = {0.5, -2, 0, 1}> { a = Add(x, by) y = Neg(a) }"
NOISY = "g (float[b,4] x) => (float[b,4] y) { d = Sin(x) e = Mul(d, d) a = Add(x, e) y = Neg(a) }"
EXACT = "g (float[b,4] x) => (float[b,4] y) { y = Neg(x) }"


@pytest.fixture
def samples():
    return np.random.default_rng(0).standard_normal((48, 4)).astype("f")


def test_scatter_is_the_error_without_what_a_bias_could_mend(net, array_data, samples):
    judge = Judge(net(EXACT), list(array_data({"x": samples}).batches("calibration", 20)), TENSORRT, 1)
    assert judge.error(net(SHIFTED)) > 0.5
    assert judge.scatter(net(SHIFTED)) < 1e-12
    error = np.sin(samples.astype(np.float64)) ** 2
    for found, wanted in ((judge.error, error), (judge.scatter, error - error.mean(0))):
        ratio = np.square(wanted).sum() / np.square(samples.astype(np.float64)).sum()
        assert found(net(NOISY)) == pytest.approx(ratio, rel=1e-5)


def test_the_mean_error_of_few_samples_counts(net, array_data, samples):
    judge = Judge(net(EXACT), list(array_data({"x": samples[:8]}).batches("calibration", 8)), TENSORRT, 1)
    assert judge.scatter(net(SHIFTED)) == judge.error(net(SHIFTED)) > 0.5
