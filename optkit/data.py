"""Data specs: YAML that says where rows come from, how they become inputs and labels, and which metric judges them."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Annotated, Any, Literal, Protocol, TypeAlias, TypeVar

import numpy as np
from pydantic import BeforeValidator, Field, model_validator

from optkit.documents import Strict, parse_yaml
from optkit.errors import DataError, RecipeError, did_you_mean
from optkit.metrics import AnyMetric, Batch, Cosine, Metric
from optkit.models import Signature, TensorSpec
from optkit.rows import AnySource, HubSource, Row, Table, file_sha256
from optkit.transforms import AnyTransform, Array, Ragged, padded

__all__ = ["Batch", "Data", "DataSpec", "Metric", "RandomData", "Samples", "Split", "open_data", "random_data"]

Split: TypeAlias = Literal["calibration", "validation", "training"]
S = TypeVar("S")
SPLITS: tuple[Split, Split] = ("calibration", "validation")
"""Those that are opened at once; the third is opened when something is trained."""


class Samples(Protocol):
    """What a model is trained on: samples that come in any order that is asked for."""

    def __len__(self) -> int: ...

    def batches(self, positions: Sequence[int], size: int, skip: int = 0) -> Iterator[Batch]:
        """Batches of ``size`` of the samples at ``positions``, from 0, in this order, without the first ``skip``.

        A source that only streams gives them in its own order, the same at every call.
        """


class Data(Protocol):
    """An opened data spec."""

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What a batch's feeds hold, with ``batch`` in front."""

    @property
    def metric(self) -> Metric:
        """What judges the outputs."""

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of at most ``size`` samples, the same ones in the same order at every call, NaN refused."""

    def training(self, readers: int = 1) -> Samples:
        """The samples to train on; none of them is in the validation split. ``readers`` threads may make batches."""

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """What identifies the samples: source, split, preprocessing, count, seed."""


# --- the document -----------------------------------------------------------------------------------------------------


class SplitSpec(Strict):
    """Which rows a split may draw, and how many it draws, at random by the seed."""

    source: AnySource | None = None
    """Its own source; the spec's if not given."""
    rows: tuple[Annotated[int, Field(ge=0)], Annotated[int, Field(ge=1)]] | None = None
    """First row and the one after the last."""
    count: int | None = Field(default=None, ge=1)
    """How many; all that the other split has not taken if not given."""


class Splits(Strict):
    """The splits. Validation shares no row with the others: from one source it draws different ones.

    Calibration draws first, validation second. Training takes what is left and may share rows with calibration.
    """

    calibration: SplitSpec = SplitSpec(count=512)
    validation: SplitSpec = SplitSpec()
    training: SplitSpec = SplitSpec()
    """For passes that train. Without a source of its own it draws from calibration's, without ``rows`` and ``count``
    from all the rows that calibration may draw, but those of validation."""


class InputSpec(Strict):
    """One input of the model, or with ``tokenize`` several."""

    column: str | tuple[str, ...]
    """The column it is made of; two of them make a pair of texts for ``tokenize``."""
    transform: tuple[AnyTransform, ...] = ()
    tensor: str | None = None
    """What must come out, as ``float32[batch,3,224,224]``; named dimensions may differ between batches."""

    @model_validator(mode="after")
    def _check(self) -> InputSpec:
        for step in self.transform[:-1]:
            if step.ends:
                raise ValueError(f"{step.use} must be the last transform")
        if self.tensor is not None:
            dims = TensorSpec.parse("tensor", self.tensor).shape
            if dims[:1] != ("batch",):
                raise ValueError(f"tensor {self.tensor}: the first dimension must be batch")
        return self


class LabelSpec(Strict):
    """The label of a sample: a number, a word of ``classes``, or an array of numbers."""

    column: str
    classes: tuple[str, ...] | None = None
    """Where labels are words: the word of class 0, of class 1, and so on."""
    transform: tuple[AnyTransform, ...] = ()


def _as_column(value: Any) -> Any:
    """Let a spec write a label or an input without options as its column's name."""
    return {"column": value} if isinstance(value, str) else value


class DataSpec(Strict):
    """A data spec. Its paths are relative to its file."""

    version: Literal[1] = 1
    name: str = "unnamed"
    description: str = ""
    fetch: str | None = None
    """The command that brings the files; shown when one is missing."""
    source: AnySource | None = None
    splits: Splits = Splits()
    inputs: dict[str, Annotated[InputSpec, BeforeValidator(_as_column)]] = Field(min_length=1)
    label: Annotated[LabelSpec, BeforeValidator(_as_column)] | None = None
    metric: AnyMetric = Cosine()

    @model_validator(mode="after")
    def _check(self) -> DataSpec:
        for split in SPLITS:
            if self.split(split).source is None and self.source is None:
                raise ValueError(f"there is no source for {split}: set source, or splits.{split}.source")
        if self.metric.needs_labels and self.label is None:
            raise ValueError(f"metric {self.metric.name} needs labels: set label to the column that has them")
        return self

    @classmethod
    def load(cls, path: str | Path) -> DataSpec:
        """Read a data spec.

        Raises:
            RecipeError: the file cannot be read or does not fit the schema; the message names file, line and key.
        """
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"{path}: cannot read the data spec: {error}") from error
        return parse_yaml(cls, text, str(path))

    def source_of(self, split: Split) -> AnySource:
        """Where the rows of a split come from."""
        source = self.split(split).source or self.source
        assert source is not None  # checked when the spec was read
        return source

    def split(self, split: Split) -> SplitSpec:
        """What the spec says of a split; training takes over from calibration what it does not say itself."""
        spec: SplitSpec = getattr(self.splits, split)
        if split == "training" and spec.source is None:
            whole = self.splits.calibration
            return spec.model_copy(update={"source": whole.source, "rows": spec.rows or whole.rows})
        return spec


# --- the opened spec --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Sample:
    where: str
    feeds: Mapping[str, Array | Ragged]
    label: Array | Ragged | None


class SpecData:
    """The samples of a data spec; rows are read when they are asked for."""

    def __init__(self, spec: DataSpec, origin: Path, seed: int = 0) -> None:
        self.spec = spec
        self.metric: Metric = spec.metric.bound(origin.parent)
        self._origin, self._folder, self._seed = origin, origin.parent, seed
        self._check_files()
        self._tables = self._open_tables()
        self._chosen = self._choose()
        self._steps = {name: _chain(part.transform, self._folder) for name, part in spec.inputs.items()}
        self._label_steps = _chain(spec.label.transform, self._folder) if spec.label else _chain((), self._folder)

    @cached_property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """What the first calibration sample is made into, with ``batch`` in front."""
        (first,) = self._samples("calibration", self._chosen["calibration"][:1])
        return tuple(self._input(name, value) for name, value in first.feeds.items())

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of at most ``size`` samples, the same ones in the same order at every call.

        ``limit`` takes the first so many of the random order. A source that only streams gives them in its own order.

        Raises:
            DataError: a sample cannot be made, does not fit the others, or holds NaN or infinity.
        """
        yield from self.drawn(split, self._rows_of(split)[:limit], size)

    def training(self, readers: int = 1) -> Samples:
        """The samples to train on.

        Raises:
            DataError: the training data are missing, empty, or shared with validation.
        """
        return _Training(self, self._rows_of("training"), readers)

    def drawn(self, split: Split, rows: Array, size: int, skip: int = 0, readers: int = 1) -> Iterator[Batch]:
        """Batches of these rows of a split, without the first ``skip``; a stream gives them in its own order.

        Rows are read one after the other; ``readers`` threads make batches of them where the transforms let them.
        """
        table = self._tables[split]
        ordered = rows if table.order == "any" else np.sort(rows)
        read = table.rows(ordered[skip:].tolist())
        chunks = iter(lambda: list(islice(read, size)), [])

        def made(chunk: Sequence[tuple[int, Row]]) -> Batch:
            return self._collate([self._sample(f"{split} data, row {index}", row) for index, row in chunk])

        steps = [step for part in self.spec.inputs.values() for step in part.transform]
        return _in_order(made, chunks, readers) if all(step.threads for step in steps) else map(made, chunks)

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """Source with the SHA-256 of its files, row numbers, preprocessing, count and seed; JSON-serializable."""
        chosen = self._rows_of(split)
        return {
            "name": self.spec.name,
            "source": self.spec.source_of(split).identity(self._folder),
            "split": split,
            "rows_sha256": hashlib.sha256(chosen.astype("<i8").tobytes()).hexdigest(),
            "preprocessing_sha256": self._preprocessing,
            "count": len(chosen),
            "seed": self._seed,
        }

    @cached_property
    def _preprocessing(self) -> str:
        parts = {name: part.model_dump(mode="json") for name, part in self.spec.inputs.items()}
        label = self.spec.label.model_dump(mode="json") if self.spec.label else None
        steps = [step for part in self.spec.inputs.values() for step in part.transform]
        files = [file_sha256(path) for step in steps for path in step.files(self._folder)]
        return hashlib.sha256(json.dumps([parts, label, files], sort_keys=True).encode()).hexdigest()

    # --- opening

    def _check_files(self) -> None:
        for split in SPLITS:
            self._check_there(split)

    def _check_there(self, split: Split) -> None:
        for path in self.spec.source_of(split).files(self._folder):
            if not path.exists():
                hint = f"; bring it with: {self.spec.fetch}" if self.spec.fetch else ""
                raise DataError(f"{self._origin}: the {split} data are missing: there is no {path}{hint}")

    def _open_tables(self) -> dict[Split, Table]:
        tables: dict[Split, Table] = {"calibration": self._open_table("calibration")}
        same = self.spec.source_of("calibration") == self.spec.source_of("validation")
        tables["validation"] = tables["calibration"] if same else self._open_table("validation")
        if not same:
            self._check_apart("calibration")
        return tables

    def _open_table(self, split: Split) -> Table:
        try:
            table = self.spec.source_of(split).open(self._folder, self._seed)
        except DataError as error:
            raise DataError(f"{self._origin}: {error}") from error
        if not len(table):
            raise DataError(f"{self._origin}: the {split} data are empty: there is not one row")
        self._check_columns(table)
        return table

    def _rows_of(self, split: Split) -> Array:
        """The rows of a split, in the order in which they are drawn; training is opened when it is first asked for."""
        if split not in self._chosen:
            self._tables[split], self._chosen[split] = self._open_training()
        return self._chosen[split]

    def _open_training(self) -> tuple[Table, Array]:
        source = self.spec.source_of("training")
        twin = next((split for split in SPLITS if self.spec.source_of(split) == source), None)
        if twin is None:
            self._check_there("training")
            self._check_apart("training")
        table = self._tables[twin] if twin else self._open_table("training")
        order = self._order(table)
        if table is self._tables["validation"]:
            order = order[~np.isin(order, self._chosen["validation"])]
        return table, self._draw("training", table, order)

    def _check_columns(self, table: Table) -> None:
        wanted = {f"input {name!r}": _columns(part.column) for name, part in self.spec.inputs.items()}
        if self.spec.label is not None:
            wanted["the label"] = (self.spec.label.column,)
        for use, columns in wanted.items():
            for column in columns:
                if column not in table.columns:
                    hint = did_you_mean(column, table.columns)
                    raise DataError(f"{self._origin}: there is no column {column!r} for {use}, {hint}")

    def _check_apart(self, split: Split) -> None:
        """Refuse a source that shares a file with validation's: rows would be in both splits."""
        source, validation = self.spec.source_of(split), self.spec.source_of("validation")
        mend = "Give the spec this one source, and both splits draw different rows of it"
        if isinstance(source, HubSource) and source.same_rows(validation):
            raise DataError(
                f"{self._origin}: {split} and validation overlap: both are {source.split} of {source.dataset}. {mend}"
            )
        files = source.files(self._folder)
        places = {path.resolve() for path in files}
        sizes = {path.stat().st_size: path for path in files}
        for path in validation.files(self._folder):
            twin = sizes.get(path.stat().st_size)
            same = path.resolve() in places or (
                source.kind != "imagefolder" and twin is not None and file_sha256(twin) == file_sha256(path)
            )
            if same:
                raise DataError(f"{self._origin}: {split} and validation overlap: {path} is in both. {mend}")

    def _choose(self) -> dict[Split, Array]:
        """The row numbers of both splits, in the order in which they are drawn."""
        calibration, validation = self._tables["calibration"], self._tables["validation"]
        first = self._draw("calibration", calibration, self._order(calibration))
        rest = self._order(validation)
        if validation is calibration:
            rest = rest[~np.isin(rest, first)]
        return {"calibration": first, "validation": self._draw("validation", validation, rest)}

    def _order(self, table: Table) -> Array:
        if table.order == "shuffled":
            return np.arange(len(table))
        return np.random.default_rng([self._seed, zlib.crc32(b"rows")]).permutation(len(table))

    def _draw(self, split: Split, table: Table, order: Array) -> Array:
        part = self.spec.split(split)
        start, stop = part.rows or (0, len(table))
        if stop > len(table):
            raise DataError(f"{self._origin}: splits.{split}.rows ends at {stop}, but there are {len(table)} rows")
        left = order[(order >= start) & (order < stop)]
        wanted = part.count if part.count is not None else max(1, len(left))
        if wanted > len(left):
            other = "calibration" if split == "validation" else split
            raise DataError(
                f"{self._origin}: {split} wants {wanted} of the rows {start} to {stop - 1}, and {len(left)} of them "
                f"are left. {other.capitalize()} and validation do not share rows: lower splits.{other}.count or "
                "splits.validation.count"
            )
        return left[:wanted]

    # --- samples

    def _samples(self, split: Split, chosen: Array) -> Iterator[_Sample]:
        for index, row in self._tables[split].rows(chosen.tolist()):
            yield self._sample(f"{split} data, row {index}", row)

    def _sample(self, where: str, row: Row) -> _Sample:
        feeds: dict[str, Array | Ragged] = {}
        for name, part in self.spec.inputs.items():
            made = self._made(f"{where}, input {name!r}", row, part.column, self._steps[name])
            several = made if isinstance(made, dict) else {name: made}
            for key, value in several.items():
                if key in feeds:
                    raise DataError(f"{self._origin}: two inputs are called {key!r}")
                feeds[key] = _checked(value, f"{self._origin}: {where}, input {key!r}")
        return _Sample(where, feeds, self._label(where, row))

    def _made(self, where: str, row: Row, column: str | tuple[str, ...], steps: Callable[[Any], Any]) -> Any:
        columns = _columns(column)
        for name in columns:
            if row.get(name) is None:
                raise DataError(f"{self._origin}: {where}: column {name!r} has no value")
        try:
            return steps(row[columns[0]] if len(columns) == 1 else tuple(row[name] for name in columns))
        except DataError as error:
            raise DataError(f"{self._origin}: {where}: {error}") from error

    def _label(self, where: str, row: Row) -> Array | Ragged | None:
        label = self.spec.label
        if label is None:
            return None
        if label.classes is not None and isinstance(row.get(label.column), str):
            row = {**row, label.column: self._class(where, label.classes, row[label.column])}
        made = self._made(f"{where}, label", row, label.column, self._label_steps)
        array = made.array if isinstance(made, Ragged) else np.asarray(made)
        if array.dtype.kind in "US":
            raise DataError(
                f"{self._origin}: {where}: the label {row[label.column]!r} is a word: list the words of all classes in "
                "label.classes"
            )
        return _checked(made, f"{self._origin}: {where}, label")

    def _class(self, where: str, classes: Sequence[str], word: str) -> int:
        if word not in classes:
            hint = did_you_mean(word, classes)
            raise DataError(f"{self._origin}: {where}: the label {word!r} is not in label.classes, {hint}")
        return classes.index(word)

    # --- batches

    def _input(self, name: str, value: Array | Ragged) -> TensorSpec:
        part = self.spec.inputs.get(name)
        array = value.array if isinstance(value, Ragged) else value
        dims: list[int | str] = list(array.shape)
        if isinstance(value, Ragged):
            dims[value.axis] = value.dim
        made = TensorSpec(name, array.dtype.name, ("batch", *dims))
        if part is None or part.tensor is None:
            return made
        wanted = TensorSpec.parse(name, part.tensor)
        if made.dtype != wanted.dtype or not _fits(made.shape, wanted.shape):
            mend = f": add {{use: cast, dtype: {wanted.dtype}}}" if made.dtype != wanted.dtype else ""
            raise DataError(f"{self._origin}: input {name!r} is {made}, and its tensor says {wanted}{mend}")
        return wanted

    def _collate(self, samples: Sequence[_Sample]) -> Batch:
        feeds = {}
        for spec in self.inputs:
            values = [sample.feeds[spec.name] for sample in samples]
            for sample, value in zip(samples, values, strict=True):
                self._check_shape(f"{sample.where}, input {spec.name!r}", value, spec)
            feeds[spec.name] = self._stack(samples, values, f"input {spec.name!r}")
        labels = [sample.label for sample in samples if sample.label is not None]
        return Batch(feeds, self._stack(samples, labels, "label") if labels else None)

    def _check_shape(self, where: str, value: Array | Ragged, spec: TensorSpec) -> None:
        array = value.array if isinstance(value, Ragged) else value
        if array.dtype.name != spec.dtype or not _fits(("batch", *array.shape), spec.shape):
            made = TensorSpec("", array.dtype.name, array.shape)
            raise DataError(
                f"{self._origin}: {where} is {made}, where the others are "
                f"{TensorSpec('', spec.dtype, spec.shape[1:])}: resize, crop, pad or cast it"
            )

    def _stack(self, samples: Sequence[_Sample], values: Sequence[Array | Ragged], what: str) -> Array:
        arrays = _same_size(values)
        for sample, array in zip(samples, arrays, strict=True):
            if array.shape != arrays[0].shape:
                raise DataError(
                    f"{self._origin}: {sample.where}, {what} has shape {list(array.shape)}, and {samples[0].where} has "
                    f"{list(arrays[0].shape)}: pad them, as in {{use: pad, size: longest}}, or run them one by one"
                )
        return np.stack(arrays)


@dataclass(frozen=True)
class _Training:
    """The training split of a spec."""

    data: SpecData
    rows: Array
    readers: int

    def __len__(self) -> int:
        return len(self.rows)

    def batches(self, positions: Sequence[int], size: int, skip: int = 0) -> Iterator[Batch]:
        return self.data.drawn("training", self.rows[np.asarray(positions, np.int64)], size, skip, self.readers)


def _in_order(make: Callable[[S], Batch], items: Iterator[S], threads: int) -> Iterator[Batch]:
    """What is made of the items, in their order, by several threads."""
    if threads == 1:
        yield from map(make, items)
        return
    with ThreadPoolExecutor(threads) as pool:
        waiting: deque[Future[Batch]] = deque()
        for item in items:
            waiting.append(pool.submit(make, item))
            if len(waiting) > threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _columns(column: str | tuple[str, ...]) -> tuple[str, ...]:
    return (column,) if isinstance(column, str) else column


def _chain(steps: Sequence[AnyTransform], folder: Path) -> Callable[[Any], Any]:
    """All steps as one function; what NumPy or pillow refuse is the step's DataError."""
    bound = [(step.use, step.bind(folder)) for step in steps]

    def run(value: Any) -> Any:
        for use, step in bound:
            try:
                value = step(value)
            except DataError as error:
                raise DataError(f"{use}: {error}") from error
            except (TypeError, ValueError, IndexError, OverflowError) as error:
                raise DataError(f"{use} does not suit it: {error}") from error
        return value

    return run


def _checked(value: Any, where: str) -> Array | Ragged:
    """The value as an array of finite numbers."""
    array = value.array if isinstance(value, Ragged) else np.asarray(value)
    if array.dtype.kind not in "iufb":
        kind = "text or a Python object" if array.dtype.kind in "OUS" else str(array.dtype)
        raise DataError(f"{where} is {kind}, not numbers: add a transform, such as decode or tokenize")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        what = "NaN" if np.isnan(array).any() else "infinity"
        raise DataError(f"{where} holds {what}: mend the row or leave it out")
    return value if isinstance(value, Ragged) else array


def _fits(shape: Sequence[int | str], wanted: Sequence[int | str]) -> bool:
    return len(shape) == len(wanted) and all(isinstance(w, str) or d == w for d, w in zip(shape, wanted, strict=True))


def _same_size(values: Sequence[Array | Ragged]) -> list[Array]:
    """The arrays, ragged ones padded to the longest of them."""
    longest = max((v.array.shape[v.axis] for v in values if isinstance(v, Ragged)), default=0)
    return [padded(v.array, v.axis, longest, v.value) if isinstance(v, Ragged) else v for v in values]


def open_data(path: str | Path, seed: int = 0) -> Data:
    """Open a data spec: find its files, check its columns, and draw the rows of both splits by the seed.

    Raises:
        RecipeError: the spec does not fit the schema.
        DataError: the data are missing, empty, or do not hold what the spec says.
    """
    return SpecData(DataSpec.load(path), Path(path), seed)


# --- without data -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RandomData:
    """Random feeds that fit a signature, without labels: they tell how alike outputs are, not whether they are right.

    Floats are standard normal, integers and booleans 0 or 1, dynamic dimensions at their ``opt`` size.
    """

    signature: Signature
    seed: int = 0
    count: int = 128
    metric: Metric = field(default_factory=Cosine)

    @property
    def inputs(self) -> tuple[TensorSpec, ...]:
        """The signature's."""
        return self.signature.inputs

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Batches of ``size``; a model without a dynamic batch gets its own size each time."""
        left = self.count if limit is None else min(limit, self.count)
        rng = np.random.default_rng([self.seed, zlib.crc32(split.encode())])
        while left > 0:
            samples = [self._feeds(rng) for _ in range(min(size, left) if self.signature.batch else 1)]
            batch = Batch({name: np.concatenate([s[name] for s in samples]) for name in samples[0]}, None)
            left -= len(batch)
            yield batch

    def training(self, readers: int = 1) -> Samples:
        """There is none.

        Raises:
            DataError: always.
        """
        raise DataError("random inputs teach a model nothing: add a `data:` section to the recipe")

    def _feeds(self, rng: np.random.Generator) -> dict[str, Array]:
        # One sample at a time, so that the samples do not depend on the batch size
        batch = self.signature.batch
        return self.signature.random_feeds(rng, **({batch: 1} if batch else {}))

    def fingerprint(self, split: Split) -> dict[str, Any]:
        """The seed and the shapes are all there is."""
        inputs = {spec.name: str(spec) for spec in self.inputs}
        return {
            "name": "random",
            "source": {"kind": "random", "inputs": inputs},
            "split": split,
            "count": self.count,
            "seed": self.seed,
        }


def random_data(signature: Signature, seed: int = 0, count: int = 128) -> Data:
    """Random samples for a model that came without data."""
    return RandomData(signature, seed, count)
