"""What turns a cell of a row into a model's input: images, text and plain arrays, one sample at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeAlias, Union

import numpy as np
from pydantic import BeforeValidator, Field

from optkit.documents import Strict
from optkit.errors import DataError, UnavailableError

Array: TypeAlias = np.ndarray[Any, Any]
Step: TypeAlias = Callable[[Any], Any]
Positive: TypeAlias = Annotated[float, Field(gt=0)]


@dataclass(frozen=True)
class Ragged:
    """An array whose size along ``axis`` may differ between samples: batches pad it with ``value`` at the end."""

    array: Array
    axis: int
    value: float
    dim: str


class Transform(Strict):
    """One step of an input's preprocessing; ``bind`` gives the function."""

    threads: ClassVar[bool] = True
    """Whether several threads may run the function at a time."""

    def bind(self, folder: Path) -> Step:
        """The step as a function; paths are relative to ``folder``."""
        return self.apply

    def apply(self, value: Any) -> Any:
        """The value after this step."""
        raise NotImplementedError

    def files(self, folder: Path) -> Sequence[Path]:
        """The files that decide what the step does, beside its own options."""
        return ()

    @property
    def ends(self) -> bool:
        """Whether nothing may follow this step."""
        return False


class Decode(Transform):
    """An encoded image (bytes, a path, or what ``datasets`` gives) becomes uint8 [height, width, channels]."""

    use: Literal["decode"] = "decode"
    mode: Literal["RGB", "L"] = "RGB"

    def apply(self, value: Any) -> Array:
        """Decode one image, turned upright as its EXIF data say."""
        pillow, name = _pillow(), _image_name(value)
        try:
            image = value if isinstance(value, pillow.Image) else pillow.open(_image_source(value))
            upright = _upright(image)
            pixels = np.asarray(upright.convert(self.mode))
        except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
            raise DataError(f"{name} is not a readable image: {error}") from error
        return pixels.reshape(*pixels.shape[:2], -1)


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise UnavailableError("images need pillow: pip install 'optkit[images]'") from error
    return Image


def _upright(image: Any) -> Any:
    from PIL import ImageOps

    return ImageOps.exif_transpose(image)


def _image_source(value: Any) -> Any:
    if isinstance(value, Mapping):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, (bytes, bytearray)):
        return io.BytesIO(value)
    if isinstance(value, (str, Path)):
        # Read whole: pillow leaves a file that it opened itself open when decoding fails
        return io.BytesIO(Path(value).read_bytes())
    raise ValueError(f"it is {type(value).__name__}, not bytes or a path")


def _image_name(value: Any) -> str:
    path = value.get("path") if isinstance(value, Mapping) else value
    return str(path) if isinstance(path, (str, Path)) else "the cell"


class Resize(Transform):
    """Scale an image [height, width, channels]: one number is its new shorter side, two are height and width."""

    use: Literal["resize"] = "resize"
    size: Annotated[int, Field(ge=1)] | tuple[int, int]
    method: Literal["bilinear", "bicubic", "nearest"] = "bilinear"

    def apply(self, value: Any) -> Array:
        """Resample with the antialiasing of pillow."""
        pixels = _image(value)
        height, width = self._target(*pixels.shape[:2])
        method = getattr(_pillow().Resampling, self.method.upper())
        channels = [_resized(pixels[:, :, index], (width, height), method) for index in range(pixels.shape[2])]
        return np.stack(channels, axis=-1)

    def _target(self, height: int, width: int) -> tuple[int, int]:
        if not isinstance(self.size, int):
            return self.size
        if height <= width:
            return self.size, max(1, int(self.size * width / height))
        return max(1, int(self.size * height / width)), self.size


def _resized(channel: Array, size: tuple[int, int], method: Any) -> Array:
    # uint8 stays uint8, which rounds as every other tool does; anything else is resampled in float32
    plain = channel if channel.dtype == np.uint8 else channel.astype(np.float32)
    return np.asarray(_pillow().fromarray(np.ascontiguousarray(plain)).resize(size, method))


def _image(value: Any) -> Array:
    pixels = np.asarray(value)
    if pixels.ndim == 2:
        return pixels[:, :, None]
    if pixels.ndim != 3:
        raise DataError(
            f"an image [height, width, channels] is wanted, not shape {list(pixels.shape)}: decode it first"
        )
    return pixels


class CenterCrop(Transform):
    """Cut the middle out of an image [height, width, channels]."""

    use: Literal["center_crop"] = "center_crop"
    size: Annotated[int, Field(ge=1)] | tuple[int, int]

    def apply(self, value: Any) -> Array:
        """Crop; an image that is smaller is an error."""
        pixels = _image(value)
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        if pixels.shape[0] < height or pixels.shape[1] < width:
            raise DataError(
                f"the image is {pixels.shape[0]} x {pixels.shape[1]}, smaller than the crop of {height} x {width}: "
                "resize it first"
            )
        top, left = (pixels.shape[0] - height) // 2, (pixels.shape[1] - width) // 2
        return pixels[top : top + height, left : left + width]


class ToFloat(Transform):
    """Divide by ``divide``, in float32: pixels to 0..1."""

    use: Literal["to_float"] = "to_float"
    divide: float = Field(default=255.0, gt=0)

    def apply(self, value: Any) -> Array:
        """``value / divide``."""
        return np.asarray(np.divide(value, np.float32(self.divide), dtype=np.float32))


class Normalize(Transform):
    """``(value - mean) / std``, one number for all or one for each channel along ``axis``."""

    use: Literal["normalize"] = "normalize"
    mean: float | tuple[float, ...]
    std: Positive | tuple[Positive, ...]
    axis: int = -1

    def apply(self, value: Any) -> Array:
        """Normalize in float32."""
        array = np.asarray(value).astype(np.float32)
        return (array - self._along(self.mean, array)) / self._along(self.std, array)

    def _along(self, numbers: float | tuple[float, ...], array: Array) -> Array:
        values = np.asarray(numbers, np.float32)
        if values.ndim == 0:
            return values
        if array.shape[self.axis] != len(values):
            raise DataError(
                f"{len(values)} numbers for axis {self.axis} of shape {list(array.shape)}: normalize before "
                "channels_first, or set its axis"
            )
        shape = [1] * array.ndim
        shape[self.axis] = -1
        return values.reshape(shape)


class ChannelsFirst(Transform):
    """[height, width, channels] becomes [channels, height, width]."""

    use: Literal["channels_first"] = "channels_first"

    def apply(self, value: Any) -> Array:
        """Move the channels to the front."""
        channels_first: Array = np.moveaxis(_image(value), -1, 0)
        return channels_first


class Transpose(Transform):
    """Reorder the axes."""

    use: Literal["transpose"] = "transpose"
    axes: tuple[int, ...]

    def apply(self, value: Any) -> Array:
        """As ``numpy.transpose``."""
        return np.transpose(np.asarray(value), self.axes)


class ExpandDims(Transform):
    """Insert an axis of size one."""

    use: Literal["expand_dims"] = "expand_dims"
    axis: int = 0

    def apply(self, value: Any) -> Array:
        """As ``numpy.expand_dims``."""
        return np.expand_dims(np.asarray(value), self.axis)


class Reshape(Transform):
    """Give the same numbers another shape; one size may be -1."""

    use: Literal["reshape"] = "reshape"
    shape: tuple[int, ...]

    def apply(self, value: Any) -> Array:
        """As ``numpy.reshape``."""
        return np.reshape(np.asarray(value), self.shape)


class Cast(Transform):
    """Change the dtype."""

    use: Literal["cast"] = "cast"
    dtype: Literal["float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool"]

    def apply(self, value: Any) -> Array:
        """As ``numpy.astype``."""
        return np.asarray(value).astype(self.dtype)


class Pad(Transform):
    """Fill up at the end of ``axis``: to a fixed ``size``, or to the ``longest`` sample of each batch."""

    use: Literal["pad"] = "pad"
    size: Annotated[int, Field(ge=1)] | Literal["longest"]
    axis: int = -1
    value: float = 0.0
    truncate: bool = False
    """Cut what is longer than ``size``; otherwise it is an error."""
    dim: str = "sequence"
    """The name of the axis where its size differs between batches."""

    @property
    def ends(self) -> bool:
        """Padding within a batch happens after everything else."""
        return self.size == "longest"

    def apply(self, value: Any) -> Array | Ragged:
        """Pad, or leave it to the batch."""
        array = np.asarray(value)
        if not -array.ndim <= self.axis < array.ndim:
            raise DataError(f"there is no axis {self.axis} in shape {list(array.shape)}")
        if self.size == "longest":
            return Ragged(array, self.axis % array.ndim, self.value, self.dim)
        length = array.shape[self.axis]
        if length > self.size:
            if not self.truncate:
                raise DataError(f"it is {length} long, more than {self.size}: set truncate: true, or a larger size")
            return np.take(array, range(self.size), axis=self.axis)
        return padded(array, self.axis, self.size, self.value)


def padded(array: Array, axis: int, size: int, value: float) -> Array:
    """``array`` filled up with ``value`` at the end of ``axis``."""
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return np.pad(array, widths, constant_values=value)


class Tokenize(Transform):
    """Text, or a pair of texts, becomes one input for each of ``fields``, named ``prefix`` and the field."""

    threads: ClassVar[bool] = False  # a tokenizer that pads in one thread refuses another ("Already borrowed")

    use: Literal["tokenize"] = "tokenize"
    tokenizer: str
    """A Hugging Face folder, relative to the data spec."""
    max_length: int = Field(default=128, ge=1)
    padding: Literal["max_length", "longest"] = "max_length"
    """To ``max_length`` always, or to the longest text of each batch."""
    fields: tuple[str, ...] = ("input_ids", "attention_mask")
    prefix: str = ""
    """Tells apart the inputs of a model that takes several texts."""
    dtype: Literal["int64", "int32"] = "int64"
    dim: str = "sequence"

    @property
    def ends(self) -> bool:
        """Its fields are inputs already."""
        return True

    def files(self, folder: Path) -> Sequence[Path]:
        """The tokenizer's vocabulary and settings."""
        names = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "merges.txt", "spiece.model")
        return [path for path in (folder / self.tokenizer / name for name in names) if path.exists()]

    def bind(self, folder: Path) -> Step:
        """Load the tokenizer once."""
        tokenizer = _load_tokenizer(folder / self.tokenizer)

        def tokenize(value: Any) -> dict[str, Array | Ragged]:
            texts = value if isinstance(value, tuple) else (value,)
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"tokenize wants text, not {', '.join(type(text).__name__ for text in texts)}")
            tokens = tokenizer(
                *texts,
                max_length=self.max_length,
                truncation=True,
                padding="max_length" if self.padding == "max_length" else False,
                return_token_type_ids="token_type_ids" in self.fields,
            )
            return {self.prefix + field: self._field(tokenizer, tokens, field) for field in self.fields}

        return tokenize

    def _field(self, tokenizer: Any, tokens: Mapping[str, Any], field: str) -> Array | Ragged:
        if field not in tokens:
            raise DataError(f"this tokenizer gives {', '.join(tokens)}, and no {field!r}")
        array = np.asarray(tokens[field], self.dtype)
        if self.padding == "max_length":
            return array
        fill = (tokenizer.pad_token_id or 0) if field == "input_ids" else 0
        return Ragged(array, 0, fill, self.dim)


def _load_tokenizer(folder: Path) -> Any:
    if not folder.is_dir():
        raise DataError(f"there is no tokenizer folder {folder}")
    try:
        from transformers import AutoTokenizer
    except ImportError as error:
        raise UnavailableError("tokenize needs transformers: pip install 'optkit[transformers]'") from error
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise DataError(f"{folder}: transformers cannot read this tokenizer: {error}") from error


def as_step(value: Any) -> Any:
    """Let a document write a step without options as its bare name."""
    return {"use": value} if isinstance(value, str) else value


AnyTransform = Annotated[
    Union[  # noqa: UP007
        Decode, Resize, CenterCrop, ToFloat, Normalize, ChannelsFirst, Transpose, ExpandDims, Reshape, Cast, Pad,
        Tokenize,
    ],
    Field(discriminator="use"),
    BeforeValidator(as_step),
]  # fmt: skip
