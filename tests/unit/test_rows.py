"""Every kind of source, whole and damaged."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter

from optkit.errors import DataError
from optkit.rows import AnySource, HubSource, Source, Table, stream_table

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The library, with its cache in a temporary folder."""
    import datasets

    patch = pytest.MonkeyPatch()
    patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))
    # Streams of several shards wait five seconds for their threads at the end
    patch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)
    yield datasets
    patch.undo()


def source(kind: str, **options: Any) -> Source:
    made: Source = TypeAdapter(AnySource).validate_python({"kind": kind, **options})
    return made


def opened(folder: Path, kind: str, **options: Any) -> Table:
    return source(kind, **options).open(folder, 0)


def column(table: Table, name: str, indices: list[int]) -> list[Any]:
    return [row[name] for _, row in table.rows(indices)]


@pytest.fixture
def x() -> Array:
    return np.random.default_rng(0).standard_normal((9, 4)).astype(np.float32)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("layout", ["C", "F"])
def test_npz(tmp_path: Path, x: Array, save: Any, layout: Any) -> None:
    save(tmp_path / "data.npz", x=np.asarray(x, order=layout), y=np.arange(9))
    table = opened(tmp_path, "npz", path="data.npz")
    assert (len(table), list(table.columns)) == (9, ["x", "y"])
    np.testing.assert_array_equal(column(table, "x", [8, 0, 3]), x[[8, 0, 3]])
    assert column(table, "y", [8, 0, 3]) == [8, 0, 3]
    assert [index for index, _ in table.rows([2, 1])] == [2, 1]


def test_npz_stays_on_disk(tmp_path: Path, x: Array) -> None:
    np.savez(tmp_path / "data.npz", x=x)
    table = opened(tmp_path, "npz", path="data.npz")
    assert isinstance(table.arrays["x"], np.memmap)  # type: ignore[attr-defined]
    assert not isinstance(column(table, "x", [0])[0], np.memmap)


def test_npy(tmp_path: Path, x: Array) -> None:
    np.save(tmp_path / "x.npy", x)
    table = opened(tmp_path, "npy", columns={"image": "x.npy"})
    np.testing.assert_array_equal(column(table, "image", [5]), x[[5]])


def idx(array: Array, kind: int) -> bytes:
    return struct.pack(f">HBB{array.ndim}I", 0, kind, array.ndim, *array.shape) + array.tobytes()


@pytest.mark.parametrize("packed", [False, True])
def test_idx(tmp_path: Path, packed: bool) -> None:
    images = np.arange(24, dtype=np.uint8).reshape(4, 3, 2)
    numbers = np.array([1, 2, 300, -4], ">i4")
    (tmp_path / "images").write_bytes(gzip.compress(idx(images, 0x08)) if packed else idx(images, 0x08))
    (tmp_path / "numbers").write_bytes(idx(numbers, 0x0C))
    table = opened(tmp_path, "idx", columns={"image": "images", "label": "numbers"})
    np.testing.assert_array_equal(column(table, "image", [3, 1]), images[[3, 1]])
    assert column(table, "label", [2, 3]) == [300, -4]


@pytest.mark.parametrize(
    ("kind", "name", "content", "message"),
    [
        ("idx", "a", b"", r"a: cannot read it"),
        ("idx", "a", b"GIF89a", "this is not an IDX file"),
        ("idx", "a", idx(np.zeros((4, 4), np.uint8), 0x08)[:-1], "it is truncated: 15 bytes of data, not 16"),
        ("idx", "a", gzip.compress(idx(np.zeros((99, 99), np.uint8), 0x08), mtime=0)[:-9], "a: cannot read it"),
        ("npz", "a.npz", b"PK", "cannot read it: File is not a zip file"),
        ("npz", "a.npz", b"PK\x05\x06" + bytes(18), "the archive is empty"),
        ("npy", "a.npy", b"\x93NUMPY", "cannot read it"),
    ],
)
def test_damaged_arrays(tmp_path: Path, kind: str, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    options = {"path": name} if kind == "npz" else {"columns": {"x": name}}
    with pytest.raises(DataError, match=message):
        opened(tmp_path, kind, **options)


def test_arrays_that_do_not_make_a_table(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.zeros(3), y=np.zeros(2))
    with pytest.raises(DataError, match="the columns have different numbers of rows: x 3, y 2"):
        opened(tmp_path, "npz", path="a.npz")
    np.savez(tmp_path / "b.npz", x=np.zeros(3), y=np.float32(1))
    with pytest.raises(DataError, match="column 'y' is a single number"):
        opened(tmp_path, "npz", path="b.npz")
    np.savez(tmp_path / "c.npz", x=np.array([{}, {}], object))
    with pytest.raises(DataError, match="it holds Python objects, which would run code"):
        opened(tmp_path, "npz", path="c.npz")


def images(folder: Path, *names: str) -> None:
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (2, 2)).save(path)


def test_imagefolder(tmp_path: Path) -> None:
    images(tmp_path, "a/dog/2.jpg", "a/dog/1.png", "a/cat/9.PNG")
    (tmp_path / "a/dog/notes.txt").write_text("")
    table = opened(tmp_path, "imagefolder", path="a")
    assert list(table.columns) == ["image", "label"]
    rows = [row for _, row in table.rows(range(len(table)))]
    assert [(row["image"].name, row["label"]) for row in rows] == [("9.PNG", 0), ("1.png", 1), ("2.jpg", 1)]
    identity = source("imagefolder", path="a").identity(tmp_path)
    images(tmp_path, "a/cat/3.png")
    assert source("imagefolder", path="a").identity(tmp_path)["listing_sha256"] != identity["listing_sha256"]


def test_imagefolder_without_classes_and_without_images(tmp_path: Path) -> None:
    images(tmp_path, "a/1.png")
    assert list(opened(tmp_path, "imagefolder", path="a").columns) == ["image"]
    (tmp_path / "b").mkdir()
    with pytest.raises(DataError, match="there are no images in this folder"):
        opened(tmp_path, "imagefolder", path="b")


def test_parquet_csv_and_json(tmp_path: Path, datasets: Any) -> None:
    table = datasets.Dataset.from_dict({"text": ["a", "b", "c"], "label": [2, 0, 1]})
    table.to_parquet(tmp_path / "a.parquet")
    table.to_json(tmp_path / "a.json")
    (tmp_path / "a.tsv").write_text("text\tlabel\na\t2\nb\t0\n")
    (tmp_path / "b.tsv").write_text("text\tlabel\nc\t1\n")
    for opened_table in (
        opened(tmp_path, "parquet", path="a.parquet"),
        opened(tmp_path, "json", path="a.json"),
        opened(tmp_path, "csv", path=["a.tsv", "b.tsv"], delimiter="\t"),
        opened(tmp_path, "csv", path="*.tsv", delimiter="\t"),
    ):
        assert (len(opened_table), list(opened_table.columns)) == (3, ["text", "label"])
        assert column(opened_table, "text", [2, 0]) == ["c", "a"]
        assert column(opened_table, "label", [0, 1, 2]) == [2, 0, 1]


def test_a_local_file_is_reported_to_nobody(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.Dataset.from_dict({"n": [1]}).to_parquet(tmp_path / "a.parquet")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    calls: list[str] = []
    monkeypatch.setattr(datasets.load, "get_session", lambda: calls.append("the hub was called"))
    opened(tmp_path, "parquet", path="a.parquet")
    assert calls == []


def test_images_in_parquet_and_save_to_disk_stay_encoded(tmp_path: Path, datasets: Any) -> None:
    images(tmp_path, "1.png")
    features = datasets.Features({"image": datasets.Image()})
    cells = [{"bytes": (tmp_path / "1.png").read_bytes(), "path": None}]
    table = datasets.Dataset.from_dict({"image": cells}, features=features)
    table.to_parquet(tmp_path / "a.parquet")
    (cell,) = column(opened(tmp_path, "parquet", path="a.parquet"), "image", [0])
    assert cell["bytes"] == (tmp_path / "1.png").read_bytes()
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "saved")
    train = source("arrow", path="saved", split="train")
    (cell,) = column(train.open(tmp_path, 0), "image", [0])
    assert set(cell) == {"bytes", "path"}
    assert all(path.suffix == ".arrow" for path in train.files(tmp_path))
    with pytest.raises(DataError, match="holds several splits: set split; did you mean 'train'"):
        opened(tmp_path, "arrow", path="saved", split="trian")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_what_datasets_cannot_read(tmp_path: Path, datasets: Any, kind: str) -> None:
    (tmp_path / "a").write_bytes(b"not a table")
    with pytest.raises(DataError, match="a: datasets cannot read it: "):
        opened(tmp_path, kind, path="a")


def test_the_hub_streams_and_shuffles_by_the_seed(tmp_path: Path, datasets: Any) -> None:
    datasets.Dataset.from_dict({"n": list(range(50))}).to_parquet(tmp_path / "a.parquet")
    stream = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), split="train", streaming=True)
    spec = HubSource(dataset="some/set", split="train", buffer=20, length=50)
    table = stream_table(datasets, stream, spec, seed=1)
    assert (len(table), list(table.columns), table.order) == (50, ["n"], "shuffled")
    everything = column(table, "n", list(range(50)))
    assert sorted(everything) == list(range(50))
    assert everything != sorted(everything)
    assert column(table, "n", list(range(10, 20))) == everything[10:20]
    assert column(stream_table(datasets, stream, spec, seed=2), "n", list(range(50))) != everything
    with pytest.raises(DataError, match="some/set ended early: 1 of the 2 rows did not come"):
        column(table, "n", [0, 50])
    with pytest.raises(DataError, match="does not say how many rows there are: set length"):
        stream_table(datasets, stream, HubSource(dataset="some/set", split="train"), seed=1)


def test_the_hub_without_internet(tmp_path: Path, datasets: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"some/set on the hub: .*without internet, name local files: kind: parquet"):
        opened(tmp_path, "hub", dataset="some/set", split="train")


FUNCTIONS = """
def stream(n):
    yield from ({"x": i} for i in range(n))

def rows(n):
    return [{"x": i} for i in range(n)]

def number():
    return 3

def pairs():
    yield (1, 2)

def breaks():
    yield {"x": 0}
    raise RuntimeError("the disk is gone")
"""


@pytest.mark.parametrize(("function", "order"), [("stream", "stream"), ("rows", "any")])
def test_a_python_function(tmp_path: Path, function: str, order: str) -> None:
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    table = opened(tmp_path, "python", function=f"rows.py:{function}", arguments={"n": 7})
    assert (len(table), list(table.columns), table.order) == (7, ["x"], order)
    assert sorted(column(table, "x", [5, 2])) == [2, 5]
    assert sorted(column(table, "x", [6, 2])) == [2, 6]
    assert len(opened(tmp_path, "python", function=f"rows.py:{function}", arguments={"n": 0})) == 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("number", r"rows\.py:number must return rows, not int"),
        ("pairs", r"rows\.py:pairs must give rows as mappings of columns to values, not tuple"),
        ("breaks", r"rows\.py:breaks failed: RuntimeError: the disk is gone"),
        ("stream", r"rows\.py:stream failed: TypeError"),
        ("steam", r"there is no function 'steam', did you mean 'stream'"),
    ],
)
def test_a_python_function_that_fails(tmp_path: Path, function: str, message: str) -> None:
    (tmp_path / "rows.py").write_text(FUNCTIONS)
    with pytest.raises(DataError, match=message):
        opened(tmp_path, "python", function=f"rows.py:{function}")
