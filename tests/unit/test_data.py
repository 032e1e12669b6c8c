"""Data specs: what they give, in which order, and every way in which data can be wrong."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from optkit.data import Data, DataSpec, open_data, random_data
from optkit.errors import DataError, RecipeError
from optkit.models import DimRange, Signature, TensorSpec
from optkit.transforms import ToFloat, Tokenize

COUNT = 40


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with 40 samples: ``x`` [4] holds the row number four times, ``y`` is the row number modulo 3."""
    rows = np.arange(COUNT)
    np.savez(tmp_path / "data.npz", x=np.repeat(rows[:, None], 4, axis=1).astype(np.float32), y=rows % 3)
    return tmp_path


def write(folder: Path, **changes: Any) -> Path:
    spec: dict[str, Any] = {
        "source": {"kind": "npz", "path": "data.npz"},
        "splits": {"calibration": {"count": 8}},
        "inputs": {"x": "x"},
        "label": "y",
        "metric": "top1",
    }
    spec.update(changes)
    path = folder / "spec.yaml"
    path.write_text(yaml.safe_dump({key: value for key, value in spec.items() if value is not None}))
    return path


def rows_of(data: Data, split: Any, size: int = 7, limit: int | None = None) -> list[int]:
    return [int(row) for batch in data.batches(split, size, limit) for row in batch.feeds["x"][:, 0]]


def test_a_batch_holds_feeds_and_labels(folder: Path) -> None:
    data = open_data(write(folder))
    assert data.inputs == (TensorSpec("x", "float32", ("batch", 4)),)
    assert data.metric.name == "top1"
    batches = list(data.batches("validation", 10))
    assert [len(batch) for batch in batches] == [10, 10, 10, 2]
    for batch in batches:
        assert batch.labels is not None
        np.testing.assert_array_equal(batch.feeds["x"][:, 0] % 3, batch.labels)


def test_splits_of_one_source_share_no_row(folder: Path) -> None:
    data = open_data(write(folder))
    calibration, validation = rows_of(data, "calibration"), rows_of(data, "validation")
    assert len(calibration) == 8
    assert sorted(calibration + validation) == list(range(COUNT))


def test_the_seed_alone_decides_which_samples_come_and_in_which_order(folder: Path) -> None:
    spec = write(folder)
    data = open_data(spec, seed=1)
    order = rows_of(data, "validation")
    assert order == rows_of(data, "validation", size=3) == rows_of(open_data(spec, seed=1), "validation")
    assert order != sorted(order)
    assert order != rows_of(open_data(spec, seed=2), "validation")
    assert rows_of(data, "validation", limit=5) == order[:5]
    assert rows_of(data, "validation", limit=0) == []


def test_a_split_can_be_held_to_a_range_of_rows(folder: Path) -> None:
    splits = {"calibration": {"rows": [0, 10]}, "validation": {"rows": [5, 30], "count": 20}}
    data = open_data(write(folder, splits=splits))
    assert sorted(rows_of(data, "calibration")) == list(range(10))
    assert sorted(rows_of(data, "validation")) == list(range(10, 30))


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ({"calibration": {}}, "validation wants 1 of the rows 0 to 39, and 0 of them are left"),
        (
            {"calibration": {"count": 30}, "validation": {"count": 11}},
            "validation wants 11 of the rows 0 to 39, and 10 of them are left",
        ),
        ({"calibration": {"count": 41}}, "calibration wants 41 of the rows 0 to 39, and 40"),
        ({"calibration": {"count": 1}, "validation": {"rows": [0, 41]}}, "ends at 41, but there are 40 rows"),
    ],
)
def test_splits_that_would_have_to_overlap_are_refused(folder: Path, splits: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(write(folder, splits=splits))


def test_a_copy_of_the_calibration_file_is_not_validation_data(folder: Path) -> None:
    (folder / "copy.npz").write_bytes((folder / "data.npz").read_bytes())
    splits = {"calibration": {"count": 4}, "validation": {"source": {"kind": "npz", "path": "copy.npz"}}}
    with pytest.raises(DataError, match=r"calibration and validation overlap: .*copy\.npz is in both"):
        open_data(write(folder, splits=splits))


def test_splits_may_have_sources_of_their_own(folder: Path) -> None:
    np.savez(folder / "other.npz", x=np.full((3, 4), 99, np.float32), y=np.zeros(3, np.int64))
    splits = {"validation": {"source": {"kind": "npz", "path": "other.npz"}}, "calibration": {"count": 40}}
    data = open_data(write(folder, splits=splits))
    assert sorted(rows_of(data, "calibration")) == list(range(COUNT))
    assert rows_of(data, "validation") == [99, 99, 99]


def test_the_fingerprint_changes_with_all_that_matters_and_nothing_else(folder: Path) -> None:
    def fingerprint(seed: int = 0, **changes: Any) -> dict[str, Any]:
        return open_data(write(folder, **changes), seed).fingerprint("validation")

    first = fingerprint()
    assert json.loads(json.dumps(first)) == first == fingerprint()
    assert first["count"] == 32
    assert first["source"]["files"][0]["bytes"] == (folder / "data.npz").stat().st_size
    assert len(first["source"]["files"][0]["sha256"]) == 64
    assert fingerprint(seed=1)["rows_sha256"] != first["rows_sha256"]
    scaled = fingerprint(inputs={"x": {"column": "x", "transform": [{"use": "to_float"}]}})
    assert scaled["preprocessing_sha256"] != first["preprocessing_sha256"]
    assert scaled["rows_sha256"] == first["rows_sha256"]
    np.savez(folder / "data.npz", x=np.zeros((COUNT, 4), np.float32), y=np.arange(COUNT))
    assert fingerprint()["source"]["files"] != first["source"]["files"]


# --- training ---------------------------------------------------------------------------------------------------------


def trained_on(data: Data, **skip: int) -> list[int]:
    samples = data.training()
    return [int(row) for batch in samples.batches(range(len(samples)), 7, **skip) for row in batch.feeds["x"][:, 0]]


@pytest.mark.parametrize(
    ("splits", "count"),
    [
        ({"calibration": {"count": 8}, "validation": {"count": 10}}, 30),  # one source: what validation has not taken
        ({"calibration": {"count": 8}}, 8),
        ({"calibration": {"count": 4, "rows": [0, 20]}, "validation": {"rows": [10, 40], "count": 20}}, None),
        ({"calibration": {"count": 8}, "validation": {"count": 10}, "training": {"count": 5}}, 5),
    ],
)
def test_training_takes_what_calibration_may_but_nothing_of_validation(folder: Path, splits: Any, count: Any) -> None:
    data = open_data(write(folder, splits=splits))
    rows, validation = trained_on(data), rows_of(data, "validation")
    assert not set(rows) & set(validation) and len(set(rows)) == len(rows)
    expected = set(range(*splits["calibration"].get("rows", (0, COUNT)))) - set(validation)
    assert set(rows) == expected if count is None else len(rows) == count
    assert data.fingerprint("training")["count"] == len(rows)


def test_training_from_the_calibration_source_has_no_count_of_its_own(folder: Path) -> None:
    np.savez(folder / "other.npz", x=np.full((3, 4), 99, np.float32), y=np.zeros(3, np.int64))
    splits = {"calibration": {"count": 4}, "validation": {"source": {"kind": "npz", "path": "other.npz"}}}
    data = open_data(write(folder, splits=splits))
    assert sorted(trained_on(data)) == list(range(COUNT))


def test_training_samples_come_in_the_order_asked_for(folder: Path) -> None:
    samples = open_data(write(folder)).training()
    everything = [int(batch.feeds["x"][0, 0]) for batch in samples.batches(range(8), 1)]
    some = [int(row) for batch in samples.batches([5, 0, 3, 1], 2, skip=1) for row in batch.feeds["x"][:, 0]]
    assert some == [everything[0], everything[3], everything[1]]


@pytest.mark.parametrize("skip", [0, 9])
def test_several_threads_make_the_same_batches_in_the_same_order(folder: Path, skip: int) -> None:
    data = open_data(write(folder, splits={"calibration": {"count": 8}, "validation": {"count": 4}}))
    positions = np.random.default_rng(0).permutation(len(data.training())).tolist()
    alone, together = (list(data.training(readers).batches(positions, 3, skip)) for readers in (1, 4))
    assert len(alone) == len(together) > 4
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one.feeds["x"], other.feeds["x"])
        np.testing.assert_array_equal(one.labels, other.labels)


def test_several_threads_make_batches_at_a_time_but_not_tokens(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    working, most = 0, 0

    def slowly(self: ToFloat, value: Any) -> Any:
        nonlocal working, most
        working += 1
        most = max(most, working)
        time.sleep(0.005)
        working -= 1
        return np.float32(value)

    monkeypatch.setattr(ToFloat, "apply", slowly)
    spec = write(folder, inputs={"x": {"column": "x", "transform": [{"use": "to_float"}]}})
    assert len(list(open_data(spec).training(4).batches(range(8), 1))) == 8
    assert most > 1
    most = 0
    monkeypatch.setattr(ToFloat, "threads", Tokenize.threads)
    assert len(list(open_data(spec).training(4).batches(range(8), 1))) == 8
    assert most == 1


def test_what_one_of_several_threads_finds_wrong_is_told(folder: Path) -> None:
    x = np.ones((COUNT, 4), np.float32)
    x[20] = np.nan
    np.savez(folder / "data.npz", x=x, y=np.zeros(COUNT))
    samples = open_data(write(folder, splits={"calibration": {"count": 8}, "validation": {"count": 1}})).training(3)
    with pytest.raises(DataError, match="training data, row 20, input 'x' holds NaN"):
        list(samples.batches(range(len(samples)), 2))


def test_a_stream_gives_training_samples_in_its_own_order_and_skips_alike(folder: Path) -> None:
    (folder / "stream.py").write_text("def rows():\n    yield from ({'x': [float(i)], 'y': 0} for i in range(20))\n")
    spec = write(folder, source={"kind": "python", "function": "stream.py:rows"})
    samples = open_data(spec).training()
    positions = [6, 1, 4, 3]
    rows = [int(batch.feeds["x"][0, 0]) for batch in samples.batches(positions, 1)]
    assert rows == sorted(rows)
    assert [int(batch.feeds["x"][0, 0]) for batch in samples.batches(positions, 1, skip=2)] == rows[2:]


@pytest.mark.parametrize("training", [{"rows": [30, 40]}, {"count": 31}])
def test_training_without_rows_of_its_own_is_refused(folder: Path, training: Any) -> None:
    splits = {"calibration": {"count": 4, "rows": [0, 20]}, "validation": {"rows": [30, 40]}, "training": training}
    with pytest.raises(
        DataError, match=r"training wants \d+ of the rows .* lower splits\.training\.count or splits\.val"
    ):
        open_data(write(folder, splits=splits)).training()


def test_training_files_are_looked_for_when_something_is_trained(folder: Path) -> None:
    splits = {"calibration": {"count": 4}, "training": {"source": {"kind": "npz", "path": "none.npz"}}}
    data = open_data(write(folder, splits=splits))
    assert len(rows_of(data, "calibration")) == 4
    with pytest.raises(DataError, match=r"the training data are missing: there is no .*none\.npz"):
        data.training()
    (folder / "none.npz").write_bytes((folder / "data.npz").read_bytes())
    with pytest.raises(DataError, match=r"training and validation overlap: .*data\.npz is in both"):
        data.training()


def test_random_inputs_are_no_training_data() -> None:
    with pytest.raises(DataError, match="teach a model nothing"):
        random_data(Signature((), ())).training()


# --- specs that are wrong ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": {"use": "top_1"}}, r"spec\.yaml:\d+: metric: 'top_1' is unknown, did you mean 'top1'\?"),
        ({"sorce": {}}, r"spec\.yaml:\d+: unknown key sorce: did you mean 'source'\?"),
        ({"source": {"kind": "npz", "pth": "data.npz"}}, r"unknown key source\.pth: did you mean 'path'\?"),
        ({"inputs": {"x": {"column": "x", "transform": ["normalise"]}}}, r"'normalise' is unknown, did you mean 'norm"),
        ({"inputs": {"x": {"column": "x", "transform": [{"use": "resize", "sise": 3}]}}}, r"did you mean 'size'\?"),
        ({"inputs": {}}, "at least 1"),
        ({"source": None}, r"there is no source for calibration: set source, or splits\.calibration\.source"),
        ({"label": None}, "metric top1 needs labels: set label"),
        ({"inputs": {"x": {"column": "x", "tensor": "float32[4]"}}}, "the first dimension must be batch"),
        (
            {"inputs": {"x": {"column": "x", "transform": [{"use": "pad", "size": "longest"}, "to_float"]}}},
            "pad must be the last transform",
        ),
    ],
)
def test_a_wrong_spec_is_refused_with_its_line(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        open_data(write(folder, **changes))
    assert "spec.yaml" in str(caught.value)


def test_a_spec_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: cannot read the data spec"):
        DataSpec.load(tmp_path / "none.yaml")


# --- data that are wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"inputs": {"x": "xx"}}, r"there is no column 'xx' for input 'x', did you mean 'x'\?"),
        ({"label": "label"}, "there is no column 'label' for the label, known: x, y"),
        (
            {"source": {"kind": "npz", "path": "none.npz"}, "fetch": "python fetch.py"},
            r"calibration data are missing: there is no .*none\.npz; bring it with: python fetch\.py",
        ),
        ({"inputs": {"x": {"column": "x", "tensor": "float16[batch,4]"}}}, "add {use: cast, dtype: float16}"),
        (
            {"inputs": {"x": {"column": "x", "tensor": "float32[batch,5]"}}},
            r"is float32\[batch,4\], and its tensor says",
        ),
        ({"inputs": {"x": {"column": "x", "transform": ["channels_first"]}}}, r"channels_first: an image .* is wanted"),
        (
            {"inputs": {"x": {"column": "x", "transform": [{"use": "reshape", "shape": [3]}]}}},
            r"calibration data, row \d+, input 'x': reshape does not suit it",
        ),
    ],
)
def test_data_that_do_not_hold_what_the_spec_says(folder: Path, changes: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        print(open_data(write(folder, **changes)).inputs)


def test_an_empty_data_set(folder: Path) -> None:
    np.savez(folder / "data.npz", x=np.zeros((0, 4), np.float32), y=np.zeros(0, np.int64))
    with pytest.raises(DataError, match="the calibration data are empty: there is not one row"):
        open_data(write(folder))


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinity")])
def test_nan_names_the_row_and_the_input(folder: Path, value: float, word: str) -> None:
    x = np.zeros((COUNT, 4), np.float32)
    x[17, 2] = value
    np.savez(folder / "data.npz", x=x, y=np.zeros(COUNT, np.int64))
    splits = {"calibration": {"rows": [0, 10]}}
    with pytest.raises(DataError, match=f"validation data, row 17, input 'x' holds {word}"):
        list(open_data(write(folder, splits=splits)).batches("validation", 4))


def test_nan_in_a_label(folder: Path) -> None:
    np.savez(folder / "data.npz", x=np.zeros((2, 4), np.float32), y=np.array([np.nan, np.nan]))
    spec = write(folder, splits={"calibration": {"count": 1}}, metric="spearman")
    with pytest.raises(DataError, match=r"row \d, label holds NaN"):
        list(open_data(spec).batches("validation", 1))


ROWS = """
def ragged(lengths):
    return [{"x": [float(n)] * n, "y": n % 2} for n in lengths]

def words():
    yield from ({"x": [1.0], "y": word} for word in ("cat", "dog", "cow"))
"""


def python_rows(folder: Path, function: str, **changes: Any) -> Path:
    (folder / "rows.py").write_text(ROWS)
    source = {"kind": "python", "function": f"rows.py:{function}", **changes.pop("source", {})}
    return write(folder, source=source, splits={"calibration": {"count": 1}}, **changes)


def test_samples_of_different_shapes_are_named(folder: Path) -> None:
    spec = python_rows(folder, "ragged", source={"arguments": {"lengths": [3, 3, 3, 2]}})
    with pytest.raises(DataError, match=r"row \d, input 'x' is float64\[\d\], where the others are float64\[\d\]"):
        list(open_data(spec).batches("validation", 4))


def test_a_batch_is_padded_to_its_longest_sample(folder: Path) -> None:
    pad = [{"use": "cast", "dtype": "float32"}, {"use": "pad", "size": "longest", "value": -1, "dim": "time"}]
    inputs = {"x": {"column": "x", "transform": pad}}
    spec = python_rows(folder, "ragged", source={"arguments": {"lengths": [1, 2, 4, 3]}}, inputs=inputs)
    data = open_data(spec)
    assert data.inputs == (TensorSpec("x", "float32", ("batch", "time")),)
    (batch,) = data.batches("validation", 3)
    lengths = batch.feeds["x"][:, 0].astype(int)
    assert batch.feeds["x"].shape == (3, lengths.max())
    np.testing.assert_array_equal((batch.feeds["x"] != -1).sum(axis=1), lengths)


def test_words_become_classes(folder: Path) -> None:
    label = {"column": "y", "classes": ["cat", "cow", "dog"]}
    data = open_data(python_rows(folder, "words", label=label))
    batches = [*data.batches("calibration", 2), *data.batches("validation", 2)]
    assert sorted(int(label) for batch in batches if batch.labels is not None for label in batch.labels) == [0, 1, 2]


@pytest.mark.parametrize(
    ("label", "message"),
    [
        ("y", r"the label '\w+' is a word: list the words"),
        ({"column": "y", "classes": ["c"]}, r"is not in label\.classes"),
    ],
)
def test_words_without_their_class_are_refused(folder: Path, label: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        print(open_data(python_rows(folder, "words", label=label)).inputs)


# --- without data -----------------------------------------------------------------------------------------------------


def test_random_data_fit_the_signature_and_do_not_depend_on_the_batch_size() -> None:
    inputs = (TensorSpec("x", "float32", ("batch", 3, "side")), TensorSpec("ids", "int64", ("batch", 2)))
    data = random_data(Signature(inputs, (), {"side": DimRange(1, 5, 9)}), seed=3, count=10)
    batches = list(data.batches("calibration", 4))
    assert [len(batch) for batch in batches] == [4, 4, 2]
    assert batches[0].feeds["x"].shape == (4, 3, 5)
    assert batches[0].labels is None
    joined = np.concatenate([batch.feeds["x"] for batch in batches])
    np.testing.assert_array_equal(joined, next(data.batches("calibration", 10)).feeds["x"])
    assert not np.array_equal(joined, next(data.batches("validation", 10)).feeds["x"])
    assert sum(map(len, data.batches("validation", 4, limit=7))) == 7
    assert data.inputs == inputs
    assert data.fingerprint("validation")["count"] == 10
    assert not data.metric.needs_labels


def test_random_data_for_a_model_of_one_batch_size() -> None:
    data = random_data(Signature((TensorSpec("x", "float32", (4, 3)),), ()), count=10)
    assert [len(batch) for batch in data.batches("validation", 1)] == [4, 4, 4]
