import numpy as np
import pytest

from optkit.data import Data
from optkit.errors import CheckpointError, DataError
from optkit.metrics import F1, Agreement, Cosine
from optkit.models import DimRange, Signature, TensorSpec
from optkit.numerics import compare
from optkit.validation import Contest, Entrant
from optkit.validation.accuracy import batch_size_for, measure_accuracy
from optkit.validation.statistics import paired_proportions

from .conftest import SIGNATURE, Arrays, Function, contest_of


def _measure(contest: Contest, data: Data, context, batch_size=16, samples=None):
    return measure_accuracy(contest, data, context, batch_size, samples, 0.95)


def test_metric_interval_and_errors_over_all_samples(samples, context):
    def candidate(x):
        y = x.copy()
        y[np.abs(x[:, 0] - samples.x[7, 0]) < 1e-9] = -x[7 % len(x)]  # one sample, wherever it is in its batch
        return y

    accuracy = _measure(contest_of(candidate), samples, context)
    assert accuracy.samples == 200
    assert accuracy.scores == {"base": 1.0, "new": 0.995}
    assert accuracy.drops["base"] == paired_proportions(1, 0, 200, 0.95)
    wanted = samples.x.copy()
    wanted[7] = -wanted[7]
    whole = compare({"y": samples.x}, {"y": wanted})
    assert accuracy.outputs is not None
    assert accuracy.outputs.outputs["y"].sqnr_db == pytest.approx(whole.sqnr_db)
    assert accuracy.outputs.max_abs == whole.max_abs


def test_every_baseline_is_scored(samples, context):
    always_zero = Function(lambda x: np.eye(3, dtype=np.float32)[np.zeros(len(x), int)])
    contest = Contest(
        (Entrant("right", Function(np.copy)), Entrant("zero", always_zero)), Entrant("new", Function(np.copy)), "right"
    )
    accuracy = _measure(contest, samples, context)
    assert accuracy.scores["zero"] == pytest.approx(np.mean(samples.labels == 0))
    assert accuracy.drops["zero"].high < 0 < accuracy.drops["right"].high


def test_batches_keep_to_settings_and_limit(samples, context):
    contest = contest_of(np.copy)
    assert _measure(contest, samples, context, batch_size=30, samples=100).samples == 100
    assert contest.candidate.runner.sizes == [30, 30, 30, 10]


@pytest.mark.parametrize(
    ("front", "dims", "wanted", "size"),
    [
        ("batch", {}, 16, 16),
        ("batch", {"batch": DimRange(1, 4, 8)}, 16, 8),
        ("batch", {"batch": DimRange(4, 4, 8)}, 1, 4),
        (1, {}, 16, 1),
        (5, {}, 16, 5),
    ],
)
def test_batch_size_is_what_the_model_takes(front, dims, wanted, size):
    signature = Signature((TensorSpec("x", "float32", (front, 3)),), SIGNATURE.outputs, dims)
    assert batch_size_for(signature, wanted) == size


def test_a_static_batch_leaves_the_rest_out_and_says_so(samples, context, caplog):
    signature = Signature((TensorSpec("x", "float32", (64, 3)),), (TensorSpec("y", "float32", (64, 3)),))
    contest = Contest(
        (Entrant("base", Function(np.copy, signature=signature)),),
        Entrant("new", Function(np.copy, signature=signature)),
        "base",
    )
    assert _measure(contest, samples, context).samples == 192
    assert "the last 8 validation samples were left out" in caplog.text


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_a_candidate_that_is_not_finite_names_output_and_sample(samples, context, value, word):
    def candidate(x):
        return np.where(x == samples.x[37], np.float32(value), x)

    accuracy = _measure(contest_of(candidate), samples, context)
    assert accuracy.broken == f"new gives {word} in output 'y' for validation sample 37, where base gives a number"
    assert accuracy.scores == {}


def test_infinity_that_the_baseline_gives_too_is_no_fault(samples, context):
    def masked(x):
        return np.where(x < -1, np.float32(-np.inf), x)

    accuracy = _measure(contest_of(masked, masked), samples, context)
    assert accuracy.broken is None
    assert accuracy.scores["new"] == accuracy.scores["base"] > 0.9
    assert accuracy.outputs is not None
    assert accuracy.outputs.max_abs == 0


def test_a_baseline_that_gives_nan_is_refused(samples, context):
    with pytest.raises(CheckpointError, match=r"base, the baseline, gives NaN in output 'y' for validation sample 20"):
        _measure(contest_of(np.copy, lambda x: np.where(x == samples.x[20], np.float32("nan"), x)), samples, context)


@pytest.mark.parametrize(("count", "batch"), [(0, "batch"), (7, 8)])
def test_fewer_samples_than_the_model_takes_are_refused(context, count, batch):
    signature = Signature((TensorSpec("x", "float32", (batch, 3)),), SIGNATURE.outputs)
    contest = Contest(
        (Entrant("base", Function(np.copy, signature=signature)),),
        Entrant("new", Function(np.copy, signature=signature)),
        "base",
    )
    with pytest.raises(DataError, match=r"there are not the \d validation samples that the model takes at a time"):
        _measure(contest, Arrays(np.zeros((count, 3), np.float32), np.zeros(count, int)), context)


def test_the_narrowest_boundary_decides_what_is_fed(samples, context):
    static = Signature((TensorSpec("x", "float32", (5, 3)),), (TensorSpec("y", "float32", (5, 3)),))
    contest = Contest(
        (Entrant("base", Function(np.copy)),), Entrant("new", Function(np.copy, signature=static)), "base"
    )
    assert _measure(contest, samples, context).samples == 200
    assert set(contest.reference.runner.sizes) == {5}


def test_without_labels_equal_outputs_lose_nothing_and_unequal_ones_a_little(samples, context):
    data = Arrays(samples.x, metric=Cosine())
    equal = _measure(contest_of(np.copy), data, context)
    assert (equal.drops["base"].low, equal.drops["base"].high) == (0, 0)
    noise = np.random.default_rng(1)
    noisy = _measure(contest_of(lambda x: x + 0.1 * noise.normal(size=x.shape).astype(np.float32)), data, context)
    assert 0 < noisy.drops["base"].low < noisy.drops["base"].high < 0.05


def test_agreement_on_every_sample_seen_is_no_proof_for_the_others(samples, context):
    accuracy = _measure(contest_of(lambda x: 1.1 * x), Arrays(samples.x, metric=Agreement()), context)
    assert accuracy.drops["base"] == paired_proportions(0, 0, 200, 0.95)


def test_a_metric_of_all_samples_is_resampled_as_a_whole(samples, context):
    accuracy = _measure(
        contest_of(lambda x: np.where(x == samples.x[3], -x, x)), Arrays(samples.x, samples.labels, F1()), context
    )
    drop = accuracy.drops["base"]
    assert drop.method == "percentile bootstrap over samples"
    assert drop.low <= drop.estimate <= drop.high
    assert 0 < drop.estimate < 0.02
