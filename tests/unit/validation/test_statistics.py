import math

import numpy as np
import pytest

from optkit.validation.statistics import (
    median_of_rounds,
    paired_metric,
    paired_proportions,
    paired_scores,
    percentile_needs,
    ratio_of_rounds,
    unseen,
)


def test_tango_interval_of_a_published_example():
    # Complete response before and after consolidation (Cavo et al., 2012), as Fagerland, Lydersen and Laake's
    # contingencytables gives it: -0.0621 (95 % CI -0.1240 to -0.0054)
    interval = paired_proportions(6, 16, 161, 0.95)
    assert [round(x, 4) for x in (interval.estimate, interval.low, interval.high)] == [-0.0621, -0.1240, -0.0054]
    mirrored = paired_proportions(16, 6, 161, 0.95)
    assert (mirrored.low, mirrored.high) == pytest.approx((-interval.high, -interval.low))


def test_without_discordant_pairs_the_interval_keeps_its_closed_form_width():
    z2 = 1.959963984540054**2
    for n in (10, 764, 10_000):
        interval = paired_proportions(0, 0, n, 0.95)
        assert interval.high == pytest.approx(z2 / (n + z2), rel=1e-6)
        assert interval.low == pytest.approx(-interval.high)


def test_all_pairs_discordant_stays_within_minus_one_and_one():
    assert paired_proportions(5, 0, 5, 0.95).high == 1
    assert paired_proportions(0, 5, 5, 0.95).low == -1


@pytest.mark.parametrize(("p_lost", "p_gained"), [(0.0, 0.0), (0.02, 0.02), (0.06, 0.01), (0.2, 0.1)])
def test_tango_coverage_is_near_nominal_by_enumeration(p_lost, p_gained):
    n, truth, covered = 60, p_lost - p_gained, 0.0
    for lost in range(30):
        for gained in range(30):
            p = _trinomial(n, lost, gained, p_lost, p_gained)
            if p > 1e-7:
                interval = paired_proportions(lost, gained, n, 0.95)
                covered += p * (interval.low <= truth <= interval.high)
    assert 0.92 <= covered <= 1
    # Where many pairs differ the normal theory holds, and more than 95 % would be mere width
    assert covered < 0.975 or p_lost < 0.1


def _trinomial(n, lost, gained, p_lost, p_gained):
    ways = math.comb(n, lost) * math.comb(n - lost, gained)
    return ways * p_lost**lost * p_gained**gained * (1 - p_lost - p_gained) ** (n - lost - gained)


def test_right_or_wrong_scores_take_the_proportion_interval():
    baseline, candidate = np.array([1, 1, 1, 0, 1.0]), np.array([1, 0, 1, 1, 0.0])
    interval = paired_scores(baseline, candidate, 0.95, np.random.default_rng(0))
    assert interval == paired_proportions(2, 1, 5, 0.95)


def test_bootstrap_of_skewed_scores_covers_the_truth():
    # Exponential drops: most samples lose nearly nothing, a few lose much
    rng, hits, trials = np.random.default_rng(7), 0, 150
    for _ in range(trials):
        drops = rng.exponential(0.02, 80)
        interval = paired_scores(np.full(80, 0.9), 0.9 - drops, 0.95, rng)
        hits += interval.low <= 0.02 <= interval.high
    assert 0.89 <= hits / trials <= 0.99


def test_bootstrap_is_seeded_and_narrower_with_less_confidence():
    rng = np.random.default_rng(1)
    baseline, candidate = rng.uniform(0.5, 1, 200), rng.uniform(0.4, 1, 200)
    wide, again, narrow = (
        paired_scores(baseline, candidate, confidence, np.random.default_rng(3)) for confidence in (0.95, 0.95, 0.8)
    )
    assert wide == again
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high


def test_when_no_sample_differs_rare_losses_stay_possible():
    same = np.linspace(0.2, 0.8, 100)
    interval = paired_scores(same, same, 0.95, np.random.default_rng(0))
    assert interval == unseen(100, 0.95)
    # A loss in a share p of samples is unseen with probability (1 - p)^n
    assert (1 - interval.high) ** 100 == pytest.approx(0.025)


def test_metric_of_all_samples_together_is_resampled_in_pairs():
    # Both models make nearly the same errors: unpaired, the interval would be far wider
    rng = np.random.default_rng(5)
    labels = rng.integers(0, 2, 400)
    baseline = np.where(rng.random(400) < 0.8, labels, 1 - labels)
    candidate = np.where(rng.random(400) < 0.99, baseline, 1 - baseline)
    rows = [np.stack([predicted, labels], axis=1) for predicted in (baseline, candidate)]
    interval = paired_metric(_f1, rows[0], rows[1], 0.95, np.random.default_rng(0))
    assert interval.estimate == pytest.approx(_f1(rows[0]) - _f1(rows[1]))
    assert interval.low < interval.estimate < interval.high
    assert interval.high - interval.low < 0.04
    same = paired_metric(_f1, rows[0], rows[0], 0.95, np.random.default_rng(0))
    assert same == unseen(400, 0.95)


def _f1(rows):
    predicted, labels = rows[:, 0] == 1, rows[:, 1] == 1
    return 2 * np.sum(predicted & labels) / (np.sum(predicted) + np.sum(labels))


def test_a_resample_without_a_score_does_not_spoil_the_interval():
    rows = np.array([[1, 1]] + [[0, 0]] * 5)
    interval = paired_metric(
        lambda r: float(r[r[:, 1] == 1, 0].mean()) if r[:, 1].any() else math.nan,
        rows,
        rows[::-1],
        0.95,
        np.random.default_rng(0),
    )
    assert math.isfinite(interval.low)
    assert math.isfinite(interval.high)


def test_needed_samples_do_decide_and_one_less_does_not():
    for interval, limit in [
        (paired_proportions(3, 1, 300, 0.95), 0.01),
        (paired_proportions(0, 0, 100, 0.95), 0.005),
        (unseen(50, 0.95), 0.01),
    ]:
        assert not interval.decides(limit)
        needed = interval.needed(limit)
        assert needed is not None
        assert interval.with_samples(needed).decides(limit)
        assert not interval.with_samples(needed - 1).decides(limit)


def test_zero_discordance_needs_the_closed_form_number_of_samples():
    # z^2 / (n + z^2) <= 0.005
    assert paired_proportions(0, 0, 100, 0.95).needed(0.005) == math.ceil(1.959963984540054**2 * 0.995 / 0.005)


def test_a_drop_exactly_on_the_limit_is_never_decided():
    assert paired_proportions(2, 0, 200, 0.95).needed(0.01) is None


def _rounds(rng, scale, rounds=20, calls=30):
    return [scale * (1 + rng.exponential(0.05, calls)) for _ in range(rounds)]


def test_a_ratio_detects_ten_percent_and_cancels_what_slows_both():
    rng = np.random.default_rng(0)
    slow, fast = _rounds(rng, 1.1e-3), _rounds(rng, 1.0e-3)
    drift = np.linspace(1, 2, 20)
    ratio = ratio_of_rounds(
        [d * turn for d, turn in zip(drift, slow, strict=True)],
        [d * turn for d, turn in zip(drift, fast, strict=True)],
        0.95,
        np.random.default_rng(1),
    )
    assert ratio.low < 1.1 < ratio.high
    assert ratio.low > 1.05
    assert ratio.high < 1.15


def test_equal_latencies_are_called_different_no_more_often_than_the_confidence_allows():
    rng, different, trials = np.random.default_rng(11), 0, 120
    for _ in range(trials):
        ratio = ratio_of_rounds(_rounds(rng, 1e-3), _rounds(rng, 1e-3), 0.95, rng)
        different += not ratio.low <= 1 <= ratio.high
    assert different / trials <= 0.1


def test_rounds_are_resampled_and_not_calls():
    # Each round has its own level: thousands of calls do not make two rounds certain
    rng = np.random.default_rng(2)
    levels = rng.lognormal(0, 0.2, 20)
    baseline = [np.full(5000, level) for level in levels]
    ratio = ratio_of_rounds(baseline, [np.ones(5000)] * 20, 0.95, rng)
    assert ratio.high / ratio.low > 1.1


def test_the_interval_of_a_median_holds_the_truth_and_drift_widens_it():
    rng, held, trials = np.random.default_rng(4), 0, 120
    truth = 1e-3 * (1 + 0.05 * math.log(2))
    for _ in range(trials):
        found = median_of_rounds(_rounds(rng, 1e-3), 0.95, rng)
        held += found.low <= truth <= found.high
    assert held / trials >= 0.9
    steady = _rounds(rng, 1e-3)
    drifting = [d * turn for d, turn in zip(np.linspace(1, 2, 20), steady, strict=True)]
    narrow, wide = (median_of_rounds(rounds, 0.95, np.random.default_rng(5)) for rounds in (steady, drifting))
    assert wide.high - wide.low > 5 * (narrow.high - narrow.low)
    assert not median_of_rounds(steady[:5], 0.95, rng).reliable


@pytest.mark.parametrize(("rounds", "reliable"), [(2, False), (5, False), (6, True)])
def test_too_few_rounds_are_not_reliable(rounds, reliable):
    rng = np.random.default_rng(0)
    assert ratio_of_rounds(_rounds(rng, 2, rounds), _rounds(rng, 1, rounds), 0.95, rng).reliable is reliable


def test_percentiles_need_the_samples_of_the_rule():
    assert [percentile_needs(q) for q in (50, 90, 95, 99)] == [7, 44, 90, 459]
    assert 0.99**459 < 0.01 < 0.99**458
