import math

import numpy as np
import pytest

from optkit.errors import PostconditionError
from optkit.numerics import compare, difference, sums


def test_equal_outputs_are_infinitely_close():
    x = {"y": np.array([1.0, -2.0, np.inf, np.nan], np.float32)}
    difference = compare(x, x)
    assert (difference.sqnr_db, difference.cosine, difference.max_abs, difference.max_rel) == (math.inf, 1, 0, 0)
    assert difference.nonfinite == 0


def test_known_noise_has_its_known_sqnr():
    reference = np.full(100, 10.0)
    noisy = reference + np.tile([0.1, -0.1], 50)
    difference = compare({"y": reference}, {"y": noisy})
    assert difference.sqnr_db == pytest.approx(40)
    assert difference.max_abs == pytest.approx(0.1)
    assert difference.max_rel == pytest.approx(0.01)
    assert difference.cosine == pytest.approx(1 / math.sqrt(1.0001))


def test_the_worst_output_speaks_for_all():
    reference = {"good": np.ones(4), "bad": np.array([3.0, 4.0])}
    difference = compare(reference, {"good": np.ones(4), "bad": np.array([-3.0, -4.0])})
    assert difference.worst == "bad"
    assert difference.cosine == pytest.approx(-1)
    assert difference.max_abs == 8
    assert difference.outputs["good"].sqnr_db == math.inf


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_value_that_is_not_finite_is_the_worst_there_is(value):
    difference = compare({"y": np.ones(3)}, {"y": np.array([1.0, value, 1.0])})
    assert (difference.sqnr_db, difference.cosine, difference.max_abs) == (-math.inf, 0, math.inf)
    assert difference.nonfinite == 1
    assert "1 values not finite" in str(difference)


def test_overflowing_squares_do_not_warn_and_integers_and_booleans_compare():
    assert compare({"y": np.array([1e30], np.float32)}, {"y": np.array([1e30], np.float32)}).sqnr_db == math.inf
    assert compare({"y": np.array([True, False])}, {"y": np.array([True, True])}).max_abs == 1


def test_a_missing_output_or_another_shape_is_an_error():
    with pytest.raises(PostconditionError, match="'y' is missing"):
        compare({"y": np.ones(1)}, {"z": np.ones(1)})
    with pytest.raises(PostconditionError, match=r"'y' has the shape \(2,\), not \(1,\)"):
        compare({"y": np.ones(1)}, {"y": np.ones(2)})


def test_the_sums_of_batches_are_the_difference_of_everything() -> None:
    rng = np.random.default_rng(0)
    reference = rng.normal(size=(12, 5))
    actual = reference + rng.normal(scale=1e-3, size=reference.shape)
    halves = [sums({"y": reference[rows]}, {"y": actual[rows]})["y"] for rows in (slice(0, 7), slice(7, 12))]
    together, whole = difference({"y": halves[0] + halves[1]}), compare({"y": reference}, {"y": actual})
    assert together.sqnr_db == pytest.approx(whole.sqnr_db, rel=1e-12)
    assert together.cosine == pytest.approx(whole.cosine, rel=1e-12)
    assert (together.max_abs, together.max_rel) == (whole.max_abs, whole.max_rel)
