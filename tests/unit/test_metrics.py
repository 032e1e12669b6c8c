"""Metrics against scikit-learn, SciPy, and cases worked out by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats
import sklearn.metrics
from pydantic import TypeAdapter

from optkit.errors import DataError
from optkit.metrics import AnyMetric, Batch, OutputMetric

Array = np.ndarray[Any, Any]


def metric(use: str, **options: Any) -> OutputMetric:
    made: OutputMetric = TypeAdapter(AnyMetric).validate_python({"use": use, **options})
    return made


def batch(n: int, labels: Any = None) -> Batch:
    return Batch({"x": np.zeros((n, 1), np.float32)}, None if labels is None else np.asarray(labels))


def scored(chosen: OutputMetric, output: Any, labels: Any = None, baseline: Any = None) -> float:
    output = np.asarray(output)
    rows = chosen.records(
        {"out": output}, batch(len(output), labels), {"out": output if baseline is None else np.asarray(baseline)}
    )
    assert len(rows) == len(output)
    if chosen.per_sample:
        assert chosen.score(rows) == pytest.approx(rows.mean())
    return chosen.score(rows)


@pytest.fixture
def logits() -> Array:
    return np.random.default_rng(0).standard_normal((200, 6)).astype(np.float32)


@pytest.fixture
def labels() -> Array:
    return np.random.default_rng(1).integers(0, 6, 200)


def test_top1(logits: Array, labels: Array) -> None:
    assert scored(metric("top1"), logits, labels) == sklearn.metrics.accuracy_score(labels, logits.argmax(1))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_topk(logits: Array, labels: Array, k: int) -> None:
    expected = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(6))
    assert scored(metric("topk", k=k), logits, labels) == pytest.approx(expected)
    assert metric("topk", k=k).name == f"top{k}"


def test_topk_does_not_count_a_tie_twice() -> None:
    assert scored(metric("topk", k=2), np.zeros((4, 4)), [0, 1, 2, 3]) == 0.5


def test_f1(logits: Array, labels: Array) -> None:
    predicted = logits.argmax(1)
    macro = sklearn.metrics.f1_score(labels, predicted, average="macro")
    assert scored(metric("f1"), logits, labels) == pytest.approx(macro)
    binary = sklearn.metrics.f1_score(labels == 2, predicted == 2)
    assert scored(metric("f1", average="binary", positive=2), logits, labels) == pytest.approx(binary)


def test_f1_of_a_class_that_never_occurs() -> None:
    assert scored(metric("f1", average="binary"), [[1.0, 0.0]], [0]) == 0.0


def test_spearman_with_ties() -> None:
    rng = np.random.default_rng(0)
    left, right = rng.integers(0, 9, 80), rng.integers(0, 9, 80)
    left = left + right
    expected = scipy.stats.spearmanr(left, right).statistic
    assert scored(metric("spearman"), left[:, None].astype(np.float32), right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("values", "labels", "expected"),
    [
        ([1.0, 2, 3], [3, 2, 1], 0.0),
        ([1.0, 1, 1], [1, 2, 3], 0.0),
        ([np.nan, 1, 2], [1, 2, 3], 0.0),
        ([1.0, 5, 9], [0, 1, 7], 1.0),
    ],
)
def test_spearman_stays_between_0_and_1(values: list[float], labels: list[int], expected: float) -> None:
    assert scored(metric("spearman"), values, labels) == pytest.approx(expected)


def test_token_accuracy_leaves_out_ignored_tokens() -> None:
    output = np.eye(3)[[[0, 1, 2], [0, 0, 0]]]
    assert scored(metric("token_accuracy"), output, [[0, 1, 0], [1, -100, -100]]) == 0.5
    assert scored(metric("token_accuracy", ignore=1), output, [[0, 1, 0], [1, 1, 1]]) == 0.5


def test_cosine() -> None:
    output, baseline = [[1.0, 0], [1, 1], [1, 0], [0, 0], [0, 0]], [[2.0, 0], [1, 0], [-1, 0], [0, 0], [1, 0]]
    rows = metric("cosine").records({"out": np.array(output)}, batch(5), {"out": np.array(baseline)})
    np.testing.assert_allclose(rows, [1, np.sqrt(0.5), 0, 1, 0])


def test_cosine_is_that_of_the_least_alike_output_unless_one_is_named() -> None:
    outputs = {"a": np.array([[1.0, 0]]), "b": np.array([[0.0, 1]])}
    baseline = {"a": np.array([[1.0, 0]]), "b": np.array([[1.0, 1]])}
    np.testing.assert_allclose(metric("cosine").records(outputs, batch(1), baseline), [np.sqrt(0.5)])
    np.testing.assert_allclose(metric("cosine", output="a").records(outputs, batch(1), baseline), [1])


def test_agreement(logits: Array) -> None:
    other = logits.copy()
    other[:50] = -other[:50]
    assert scored(metric("agreement"), other, baseline=logits) == 0.75
    assert scored(metric("agreement"), logits, baseline=logits) == 1.0


@pytest.mark.parametrize("use", ["top1", "topk", "f1", "cosine", "agreement", "token_accuracy"])
def test_nan_is_never_right(use: str) -> None:
    shape = (3, 2, 4) if use == "token_accuracy" else (3, 4)
    output = np.full(shape, np.nan)
    options = {"k": 4} if use == "topk" else {}
    assert scored(metric(use, **options), output, np.zeros(shape[:-1], np.int64)) == 0.0


@pytest.mark.parametrize(
    ("use", "output", "labels", "message"),
    [
        ("top1", np.zeros((2, 3)), [0, 3], "label 3 is not a class of an output with 3 classes"),
        ("top1", np.zeros((2, 3)), [0, -1], "label -1 is not a class"),
        ("top1", np.zeros((2, 3)), [0.5, 1.0], "labels must be whole numbers, one for each sample, not float64"),
        ("top1", np.zeros((2, 3)), None, "metric top1 needs labels"),
        ("top1", np.zeros((2, 3, 4)), [0, 1], r"an output \[samples, classes\] is wanted, not shape \[2, 3, 4\]"),
        ("top1", np.zeros((1, 3)), [0, 1], r"output 'out' has shape \[1, 3\] for 2 samples"),
        ("spearman", np.zeros((2, 3)), [0, 1], "one number for each sample is wanted"),
        ("token_accuracy", np.zeros((2, 3, 4)), [[0, 1], [0, 1]], "give one whole number for each token"),
    ],
)
def test_outputs_and_labels_that_do_not_suit_the_metric(use: str, output: Array, labels: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        metric(use).records({"out": output}, batch(2, labels), {})


def test_an_output_that_the_model_does_not_have() -> None:
    with pytest.raises(DataError, match="the model has no output 'logit', did you mean 'logits'"):
        metric("top1", output="logit").records({"logits": np.zeros((1, 2))}, batch(1, [0]), {})


def test_a_named_output_is_used() -> None:
    outputs = {"features": np.array([[1.0, 0]]), "logits": np.array([[0.0, 1]])}
    assert metric("top1", output="logits").records(outputs, batch(1, [1]), {}) == [1.0]


def test_a_python_function(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def close(outputs, labels, baseline):\n    return abs(outputs['out'][:, 0] - labels) < 0.5\n"
        "def wrong(outputs, labels, baseline):\n    return [2.0]\n"
        "def broken(outputs, labels, baseline):\n    raise KeyError('logits')\n"
    )
    close = metric("python", function="mine.py:close").bound(tmp_path)
    assert close.name == "close"
    assert scored(close, [[1.0], [2.0]], [1.2, 3.0]) == 0.5
    with pytest.raises(DataError, match=r"mine\.py:wrong must give 2 numbers from 0 to 1"):
        scored(metric("python", function="mine.py:wrong").bound(tmp_path), [[1.0], [2.0]], [1, 2])
    with pytest.raises(DataError, match=r"mine\.py:broken failed: KeyError"):
        scored(metric("python", function="mine.py:broken").bound(tmp_path), [[1.0]], [1])
    with pytest.raises(DataError, match="there is no function 'clos', did you mean 'close'"):
        metric("python", function="mine.py:clos").bound(tmp_path)
    with pytest.raises(DataError, match="there is no file"):
        metric("python", function="your.py:close").bound(tmp_path)
