"""Where rows come from: every kind of source opens as a table whose rows can be drawn by number, never all at once."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO, Annotated, Any, Literal, Protocol, TypeAlias, Union

import numpy as np
from pydantic import Field

from optkit.documents import Strict
from optkit.errors import DataError, UnavailableError, did_you_mean
from optkit.functions import find_function

Array: TypeAlias = np.ndarray[Any, Any]
Row: TypeAlias = Mapping[str, Any]
IMAGES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp")


class Table(Protocol):
    """Rows with named columns."""

    @property
    def columns(self) -> Sequence[str]:
        """The names of the columns."""

    @property
    def order(self) -> Literal["any", "stream", "shuffled"]:
        """Drawn rows come in the order asked for, in a stream's own, or in that of a stream shuffled by the seed."""

    def __len__(self) -> int: ...

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Row]]:
        """The rows of these numbers, each with its number."""


class Source(Strict):
    """Where rows come from; paths are relative to the data spec."""

    def files(self, folder: Path) -> list[Path]:
        """The files that hold the rows."""
        return []

    def open(self, folder: Path, seed: int) -> Table:
        """Open it; the rows themselves stay where they are.

        Raises:
            DataError: a file does not hold what it should.
        """
        raise NotImplementedError

    def identity(self, folder: Path) -> dict[str, Any]:
        """What tells this source from others: its own options, and size and SHA-256 of every file."""
        return {
            **self.model_dump(mode="json"),
            "files": [
                {"path": path.name, "bytes": path.stat().st_size, "sha256": file_sha256(path)}
                for path in self.files(folder)
            ],
        }


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file; an unchanged file is read once."""
    state = path.stat()
    return _file_sha256(str(path), state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=4096)
def _file_sha256(path: str, size: int, mtime: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:  # noqa: PTH123 (the cache's key is text)
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# --- arrays: mapped from their file, or from a temporary copy where the file is compressed ---------------------------


@dataclass(frozen=True)
class _Arrays:
    """A table whose columns are arrays with the rows in their first dimension."""

    arrays: Mapping[str, Array]
    order: Literal["any"] = "any"

    def __post_init__(self) -> None:
        flat = [name for name, array in self.arrays.items() if array.ndim == 0]
        if flat:
            raise DataError(f"column {flat[0]!r} is a single number, not an array of rows")
        lengths = {name: len(array) for name, array in self.arrays.items()}
        if len(set(lengths.values())) > 1:
            text = ", ".join(f"{name} {length}" for name, length in lengths.items())
            raise DataError(f"the columns have different numbers of rows: {text}")

    @property
    def columns(self) -> Sequence[str]:
        return tuple(self.arrays)

    def __len__(self) -> int:
        return len(next(iter(self.arrays.values())))

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Row]]:
        for index in indices:
            # A copy, so that no sample refers to the file
            yield index, {name: np.array(array[index]) for name, array in self.arrays.items()}


class NpzSource(Source):
    """A NumPy archive; its members are the columns."""

    kind: Literal["npz"] = "npz"
    path: str

    def files(self, folder: Path) -> list[Path]:
        """The archive."""
        return [folder / self.path]

    def open(self, folder: Path, seed: int) -> Table:
        """Map every member."""
        path = folder / self.path
        with _reading(path), zipfile.ZipFile(path) as archive:
            members = [info for info in archive.infolist() if info.filename.endswith(".npy")]
            if not members:
                raise DataError(f"{path}: the archive is empty")
            return _Arrays({info.filename[:-4]: _map_member(path, archive, info) for info in members})


class NpySource(Source):
    """One ``.npy`` file for each column."""

    kind: Literal["npy"] = "npy"
    columns: dict[str, str] = Field(min_length=1)

    def files(self, folder: Path) -> list[Path]:
        """The files of the columns."""
        return [folder / path for path in self.columns.values()]

    def open(self, folder: Path, seed: int) -> Table:
        """Map every file."""
        return _Arrays({name: _map_npy(folder / path) for name, path in self.columns.items()})


class IdxSource(Source):
    """One IDX file for each column, the format of MNIST, plain or gzipped."""

    kind: Literal["idx"] = "idx"
    columns: dict[str, str] = Field(min_length=1)

    def files(self, folder: Path) -> list[Path]:
        """The files of the columns."""
        return [folder / path for path in self.columns.values()]

    def open(self, folder: Path, seed: int) -> Table:
        """Map every file."""
        return _Arrays({name: _map_idx(folder / path) for name, path in self.columns.items()})


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, ValueError, KeyError, struct.error, zipfile.BadZipFile, zlib.error) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: cannot read it: {error}") from error


def _map_npy(path: Path) -> Array:
    with _reading(path), path.open("rb") as file:
        return _map_npy_stream(path, file, path.stat().st_size)


def _map_member(path: Path, archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> Array:
    if info.compress_type != zipfile.ZIP_STORED:
        with archive.open(info) as packed, _spooled(packed) as file:
            return _map_npy_stream(path, file, info.file_size)
    with path.open("rb") as file:
        # The member's data follow its local header, whose two last fields give the length of name and extra
        file.seek(info.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
        file.seek(info.header_offset + 30 + name + extra)
        return _map_npy_stream(path, file, file.tell() + info.file_size)


def _map_npy_stream(path: Path, file: IO[bytes], end: int) -> Array:
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(file)
    if dtype.hasobject:
        raise DataError(f"{path}: it holds Python objects, which would run code when they are read: save numbers")
    return _map(path, file, dtype, shape, "F" if fortran else "C", end)


def _map_idx(path: Path) -> Array:
    with _reading(path), path.open("rb") as raw:
        if raw.read(2) != b"\x1f\x8b":
            raw.seek(0)
            return _map_idx_stream(path, raw, path.stat().st_size)
        raw.seek(0)
        with gzip.GzipFile(fileobj=raw) as packed, _spooled(packed) as file:
            end = file.seek(0, 2)
            file.seek(0)
            return _map_idx_stream(path, file, end)


IDX_DTYPES = {0x08: "u1", 0x09: "i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}


def _map_idx_stream(path: Path, file: IO[bytes], end: int) -> Array:
    zeros, kind, rank = struct.unpack(">HBB", file.read(4))
    if zeros or kind not in IDX_DTYPES:
        raise DataError(f"{path}: this is not an IDX file")
    shape = struct.unpack(f">{rank}I", file.read(4 * rank))
    return _map(path, file, np.dtype(IDX_DTYPES[kind]), shape, "C", end)


def _map(path: Path, file: IO[bytes], dtype: Any, shape: tuple[int, ...], layout: Literal["C", "F"], end: int) -> Array:
    size = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    if file.tell() + size > end:
        raise DataError(f"{path}: it is truncated: {end - file.tell()} bytes of data, not {size}")
    if size == 0:
        return np.empty(shape, dtype)
    return np.memmap(file, dtype, "r", file.tell(), shape, layout)


@contextmanager
def _spooled(packed: IO[bytes] | gzip.GzipFile) -> Iterator[IO[bytes]]:
    """An unnamed temporary file with the unpacked bytes; what is mapped from it stays valid until it is let go."""
    with tempfile.TemporaryFile() as file:
        shutil.copyfileobj(packed, file, 1 << 20)
        file.flush()
        file.seek(0)
        yield file


# --- folders of images ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Folder:
    paths: Sequence[Path]
    classes: Sequence[str]
    order: Literal["any"] = "any"

    @property
    def columns(self) -> Sequence[str]:
        return ("image", "label") if self.classes else ("image",)

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Row]]:
        for index in indices:
            path = self.paths[index]
            label = {"label": self.classes.index(path.parent.name)} if self.classes else {}
            yield index, {"image": path, **label}


class ImageFolderSource(Source):
    """Images in ``folder/class/``: columns ``image`` and ``label``, the class's place in the alphabet."""

    kind: Literal["imagefolder"] = "imagefolder"
    path: str

    def files(self, folder: Path) -> list[Path]:
        """Every image, sorted."""
        root = folder / self.path
        found = (path for path in root.rglob("*") if path.suffix.lower() in IMAGES) if root.is_dir() else ()
        return sorted(found) or [root]

    def open(self, folder: Path, seed: int) -> Table:
        """List the images; there are labels if none of them lies in the folder itself."""
        root = folder / self.path
        paths = [path for path in self.files(folder) if path != root]
        if not paths:
            raise DataError(f"{root}: there are no images in this folder")
        flat = any(path.parent == root for path in paths)
        return _Folder(paths, () if flat else sorted({path.parent.name for path in paths}))

    def identity(self, folder: Path) -> dict[str, Any]:
        """The folder, and a SHA-256 of every image's place and size; the images themselves are not read."""
        root = folder / self.path
        listing = "".join(f"{p.relative_to(root).as_posix()}\t{p.stat().st_size}\n" for p in self.files(folder))
        digest = hashlib.sha256(listing.encode()).hexdigest()
        return {**self.model_dump(mode="json"), "files": listing.count("\n"), "listing_sha256": digest}


# --- Hugging Face datasets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _HubTable:
    """A ``datasets.Dataset``: Arrow files on disk."""

    dataset: Any
    order: Literal["any"] = "any"

    @property
    def columns(self) -> Sequence[str]:
        return tuple(self.dataset.column_names)

    def __len__(self) -> int:
        return len(self.dataset)

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Row]]:
        for index in indices:
            yield index, self.dataset[int(index)]


class TableSource(Source):
    """Local files that ``datasets`` reads into its Arrow cache: rows stay on disk."""

    kind: Literal["parquet", "csv", "json"]
    path: str | tuple[str, ...]
    """A file or several; ``*`` matches any part of a name."""
    delimiter: str = ","
    """Between the cells of a csv file."""

    def files(self, folder: Path) -> list[Path]:
        """The files that match, in the order given."""
        patterns = (self.path,) if isinstance(self.path, str) else self.path
        return [path for pattern in patterns for path in _matching(folder, pattern)]

    def open(self, folder: Path, seed: int) -> Table:
        """Let ``datasets`` read the files."""
        paths = self.files(folder)
        options = {"sep": self.delimiter} if self.kind == "csv" else {}
        with _datasets(", ".join(map(str, paths))) as datasets:
            split = datasets.load_dataset(self.kind, data_files=[str(path) for path in paths], split="train", **options)
            return _HubTable(_without_decoding(datasets, split))


def _matching(folder: Path, pattern: str) -> list[Path]:
    path = folder / pattern
    if "*" not in pattern:
        return [path]
    fixed = Path(path.anchor)
    return sorted(fixed.glob(str(path.relative_to(fixed)))) or [path]


class ArrowSource(Source):
    """A folder that ``datasets`` wrote with ``save_to_disk``."""

    kind: Literal["arrow"] = "arrow"
    path: str
    split: str | None = None
    """Which split, where the folder holds several."""

    def files(self, folder: Path) -> list[Path]:
        """The Arrow files."""
        root = folder / self.path / (self.split or "")
        return sorted(root.glob("*.arrow")) or [root]

    def open(self, folder: Path, seed: int) -> Table:
        """Let ``datasets`` map the files."""
        path = folder / self.path
        with _datasets(str(path)) as datasets:
            loaded = datasets.load_from_disk(str(path))
            if isinstance(loaded, datasets.DatasetDict):
                if self.split not in loaded:
                    hint = did_you_mean(self.split or "", loaded)
                    raise DataError(f"{path} holds several splits: set split; {hint}")
                loaded = loaded[self.split]
            return _HubTable(_without_decoding(datasets, loaded))


class HubSource(Source):
    """A data set on the Hugging Face hub, streamed: nothing but the rows that are used is downloaded."""

    kind: Literal["hub"] = "hub"
    dataset: str
    config: str | None = None
    split: str
    revision: str | None = None
    """A commit, so that the rows stay the same."""
    buffer: int = Field(default=1000, ge=1)
    """How many rows are shuffled at a time; shards are shuffled as a whole."""
    length: int | None = Field(default=None, ge=1)
    """How many rows the split has, where the hub does not say."""

    def same_rows(self, other: Source) -> bool:
        """Whether another source is this split too, however it is read."""
        if not isinstance(other, HubSource):
            return False
        return (self.dataset, self.config, self.split) == (other.dataset, other.config, other.split)

    def open(self, folder: Path, seed: int) -> Table:
        """Connect to the hub."""
        with _datasets(f"{self.dataset} on the hub", "without internet, name local files: kind: parquet") as datasets:
            stream = datasets.load_dataset(
                self.dataset, self.config, split=self.split, revision=self.revision, streaming=True
            )
            return stream_table(datasets, stream, self, seed)


def stream_table(datasets: Any, stream: Any, source: HubSource, seed: int) -> Table:
    """A ``datasets.IterableDataset``, shuffled by the seed, as a table."""
    known = (stream.info.splits or {}).get(source.split)
    length = source.length or (known.num_examples if known else None)
    if not length:
        raise DataError(f"{source.dataset}: the hub does not say how many rows there are: set length in the source")
    plain = _without_decoding(datasets, stream)
    columns = plain.column_names or tuple(next(iter(plain)))
    shuffled = plain.shuffle(seed=seed, buffer_size=source.buffer)
    return _Stream(source.dataset, tuple(columns), length, lambda: iter(shuffled), "shuffled")


@contextmanager
def _datasets(what: str, hint: str = "") -> Iterator[Any]:
    """The library, silent and without its usage counts; whatever it raises says ``what`` could not be read."""
    try:
        import datasets
    except ImportError as error:
        raise UnavailableError("this data needs the datasets package: pip install datasets") from error
    shows, counts = datasets.is_progress_bar_enabled(), datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.disable_progress_bars()
    # Otherwise even a local file is reported to the hub
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield datasets
    except DataError:
        raise
    except Exception as error:
        reason = str(error.__cause__ or error).strip().splitlines() or [type(error).__name__]
        raise DataError(f"{what}: datasets cannot read it: {reason[0]}" + (f"; {hint}" if hint else "")) from error
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counts
        if shows:
            datasets.enable_progress_bars()


def _without_decoding(datasets: Any, table: Any) -> Any:
    """Images and sounds stay as bytes or paths: the spec's transforms decode them."""
    for name, feature in (table.features or {}).items():
        if isinstance(feature, (datasets.Image, datasets.Audio)):
            table = table.cast_column(name, type(feature)(decode=False))
    return table


# --- a Python function ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stream:
    """Rows that come one after the other; each drawing runs through them once."""

    name: str
    columns: Sequence[str]
    length: int
    iterate: Callable[[], Iterator[Row]]
    order: Literal["stream", "shuffled"]

    def __len__(self) -> int:
        return self.length

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Row]]:
        wanted = set(indices)
        left = len(wanted)
        for index, row in enumerate(self.iterate() if left else ()):
            if index in wanted:
                yield index, row
                left -= 1
                if not left:
                    return
        if left:
            raise DataError(f"{self.name} ended early: {left} of the {len(wanted)} rows did not come")


@dataclass(frozen=True)
class _Indexed:
    """A sequence of rows."""

    name: str
    sequence: Sequence[Row]
    order: Literal["any"] = "any"

    @property
    def columns(self) -> Sequence[str]:
        return tuple(_row(self.name, self.sequence[0])) if len(self.sequence) else ()

    def __len__(self) -> int:
        return len(self.sequence)

    def rows(self, indices: Sequence[int]) -> Iterator[tuple[int, Row]]:
        for index in indices:
            yield index, _row(self.name, self.sequence[int(index)])


class PythonSource(Source):
    """A function that returns rows (mappings of columns to values): a sequence of them, or an iterator.

    A sequence, and whatever else has a length and an index, is read by index. An iterator is run through once to
    count its rows, and once for each drawing: it must give the same rows every time.
    """

    kind: Literal["python"] = "python"
    function: str
    """``path.py:function`` or ``module:function``."""
    arguments: dict[str, Any] = Field(default_factory=dict)

    def code(self, folder: Path) -> list[Path]:
        """The file of the function, if it is one."""
        place = self.function.rpartition(":")[0]
        return [folder / place] if place.endswith(".py") else []

    def open(self, folder: Path, seed: int) -> Table:
        """Call the function; an iterator is counted."""
        function = find_function(self.function, folder)

        def call() -> Any:
            try:
                return function(**self.arguments)
            except Exception as error:
                raise DataError(f"{self.function} failed: {type(error).__name__}: {error}") from error

        made = call()
        if isinstance(made, Sized) and hasattr(made, "__getitem__"):
            return _Indexed(self.function, made)  # type: ignore[arg-type]  # it has what is used of a sequence
        if not isinstance(made, Iterable):
            raise DataError(f"{self.function} must return rows, not {type(made).__name__}")

        def iterate() -> Iterator[Row]:
            try:
                for row in call():
                    yield _row(self.function, row)
            except DataError:
                raise
            except Exception as error:
                raise DataError(f"{self.function} failed: {type(error).__name__}: {error}") from error

        first = next(iterate(), {})
        return _Stream(self.function, tuple(first), sum(1 for _ in iterate()), iterate, "stream")

    def identity(self, folder: Path) -> dict[str, Any]:
        """The function, its arguments, and the SHA-256 of its file."""
        return {
            **self.model_dump(mode="json"),
            "files": [{"path": path.name, "sha256": file_sha256(path)} for path in self.code(folder)],
        }


def _row(name: str, row: Any) -> Row:
    if not isinstance(row, Mapping):
        raise DataError(f"{name} must give rows as mappings of columns to values, not {type(row).__name__}")
    return row


AnySource = Annotated[
    Union[  # noqa: UP007
        NpzSource, NpySource, IdxSource, ImageFolderSource, TableSource, ArrowSource, HubSource, PythonSource
    ],
    Field(discriminator="kind"),
]  # fmt: skip
