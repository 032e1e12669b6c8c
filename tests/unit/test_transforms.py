"""Every transform against NumPy, pillow or transformers, and what it says of a value that does not suit it."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from pydantic import TypeAdapter, ValidationError

from optkit.errors import DataError, UnavailableError
from optkit.transforms import AnyTransform, Ragged

Array = np.ndarray[Any, Any]


def apply(use: str, cell: Any, folder: Path = Path(), /, **options: Any) -> Any:
    return TypeAdapter(AnyTransform).validate_python({"use": use, **options}).bind(folder)(cell)


@pytest.fixture
def pixels() -> Array:
    return np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def png(pixels: Array, **options: Any) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "png", **options)
    return stream.getvalue()


def test_decode_takes_bytes_paths_and_what_datasets_gives(pixels: Array, tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    path.write_bytes(png(pixels))
    cells = [
        png(pixels),
        path,
        str(path),
        {"bytes": png(pixels), "path": None},
        {"bytes": None, "path": str(path)},
        Image.fromarray(pixels),
    ]
    for cell in cells:
        np.testing.assert_array_equal(apply("decode", cell), pixels)


def test_decode_makes_the_channels_that_were_asked_for(pixels: Array) -> None:
    gray = apply("decode", png(pixels), mode="L")
    np.testing.assert_array_equal(gray[:, :, 0], np.asarray(Image.fromarray(pixels).convert("L")))
    assert apply("decode", png(pixels[:, :, 0])).shape == (20, 30, 3)


def test_decode_turns_an_image_upright(pixels: Array) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise
    np.testing.assert_array_equal(apply("decode", png(pixels, exif=exif)), np.rot90(pixels, -1))


@pytest.mark.parametrize("cell", [b"no image", b"", 3.5, {"bytes": None, "path": None}])
def test_decode_refuses_what_is_no_image(cell: Any) -> None:
    with pytest.raises(DataError, match="the cell is not a readable image"):
        apply("decode", cell)


def test_decode_refuses_a_truncated_image_by_name(pixels: Array, tmp_path: Path) -> None:
    path = tmp_path / "half.png"
    path.write_bytes(png(pixels)[:500])
    with pytest.raises(DataError, match=r"half\.png is not a readable image"):
        apply("decode", path)


@pytest.mark.parametrize("method", ["bilinear", "bicubic", "nearest"])
def test_resize_as_pillow(pixels: Array, method: str) -> None:
    expected = Image.fromarray(pixels).resize((15, 10), getattr(Image.Resampling, method.upper()))
    np.testing.assert_array_equal(apply("resize", pixels, size=[10, 15], method=method), np.asarray(expected))
    np.testing.assert_array_equal(apply("resize", pixels, size=10, method=method), np.asarray(expected))


def test_resize_by_the_shorter_side(pixels: Array) -> None:
    assert apply("resize", pixels, size=10).shape == (10, 15, 3)
    assert apply("resize", pixels.transpose(1, 0, 2), size=10).shape == (15, 10, 3)


def test_resize_keeps_floats_floats(pixels: Array) -> None:
    floats = pixels.astype(np.float64) / 255
    resized = apply("resize", floats, size=10)
    assert resized.dtype == np.float32
    # pillow rounds uint8 after each of its two directions
    np.testing.assert_allclose(resized * 255, apply("resize", pixels, size=10), atol=1.0)


def test_center_crop(pixels: Array) -> None:
    np.testing.assert_array_equal(apply("center_crop", pixels, size=[10, 20]), pixels[5:15, 5:25])
    with pytest.raises(DataError, match="the image is 20 x 30, smaller than the crop of 21 x 21: resize it first"):
        apply("center_crop", pixels, size=21)


def test_to_float_and_normalize(pixels: Array) -> None:
    scaled = apply("to_float", pixels)
    assert scaled.dtype == np.float32
    np.testing.assert_array_equal(scaled, pixels.astype(np.float32) / np.float32(255))
    mean, std = [0.1, 0.2, 0.3], [1.0, 2.0, 4.0]
    expected = (scaled - np.array(mean, np.float32)) / np.array(std, np.float32)
    np.testing.assert_array_equal(apply("normalize", scaled, mean=mean, std=std), expected)
    first = apply("normalize", np.moveaxis(scaled, -1, 0), mean=mean, std=std, axis=0)
    np.testing.assert_array_equal(np.moveaxis(first, 0, -1), expected)
    np.testing.assert_array_equal(apply("normalize", scaled, mean=0.5, std=2), (scaled - np.float32(0.5)) / 2)


def test_normalize_along_the_wrong_axis(pixels: Array) -> None:
    with pytest.raises(DataError, match=r"3 numbers for axis -1 of shape \[3, 20, 30\]: normalize before channels_fi"):
        apply("normalize", np.moveaxis(pixels, -1, 0), mean=[0, 0, 0], std=[1, 1, 1])


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.0), (0.0, [1.0, 0.0, 1.0])])
def test_normalize_by_zero_is_refused_when_the_spec_is_read(mean: Any, std: Any) -> None:
    with pytest.raises(ValidationError, match="greater than 0"):
        apply("normalize", np.zeros(3), mean=mean, std=std)


def test_the_shapes_of_arrays(pixels: Array) -> None:
    np.testing.assert_array_equal(apply("channels_first", pixels), pixels.transpose(2, 0, 1))
    assert apply("channels_first", pixels[:, :, 0]).shape == (1, 20, 30)
    np.testing.assert_array_equal(apply("transpose", pixels, axes=[1, 0, 2]), pixels.transpose(1, 0, 2))
    assert apply("expand_dims", pixels, axis=1).shape == (20, 1, 30, 3)
    assert apply("reshape", pixels, shape=[-1, 6]).shape == (300, 6)
    assert apply("cast", pixels, dtype="int32").dtype == np.int32


def test_pad() -> None:
    np.testing.assert_array_equal(apply("pad", [1, 2], size=4, value=-100), [1, 2, -100, -100])
    np.testing.assert_array_equal(apply("pad", [1, 2, 3], size=2, truncate=True), [1, 2])
    assert apply("pad", np.ones((2, 3)), size=5, axis=0).shape == (5, 3)
    ragged = apply("pad", np.ones((2, 3)), size="longest", dim="time")
    assert isinstance(ragged, Ragged)
    assert (ragged.axis, ragged.dim) == (1, "time")
    with pytest.raises(DataError, match="it is 3 long, more than 2: set truncate: true"):
        apply("pad", [1, 2, 3], size=2)
    with pytest.raises(DataError, match=r"there is no axis 1 in shape \[3\]"):
        apply("pad", [1, 2, 3], size=4, axis=1)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a BERT tokenizer with ten words."""
    from transformers import BertTokenizerFast

    folder = tmp_path_factory.mktemp("tokenizer")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "small", "model", "fast", "is"]
    (folder / "vocab.txt").write_text("\n".join(words))
    BertTokenizerFast(vocab=str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def test_tokenize_to_a_fixed_length(tokenizer: Path) -> None:
    tokens = apply("tokenize", "a small model", tokenizer.parent, tokenizer=tokenizer.name, max_length=7)
    assert list(tokens) == ["input_ids", "attention_mask"]
    np.testing.assert_array_equal(tokens["input_ids"], [2, 5, 6, 7, 3, 0, 0])
    np.testing.assert_array_equal(tokens["attention_mask"], [1, 1, 1, 1, 1, 0, 0])
    assert tokens["input_ids"].dtype == np.int64


def test_tokenize_to_the_longest_of_a_batch(tokenizer: Path) -> None:
    options = {"tokenizer": str(tokenizer), "padding": "longest", "dtype": "int32", "max_length": 4}
    tokens = apply("tokenize", "a small fast model", **options)
    assert isinstance(tokens["input_ids"], Ragged)
    np.testing.assert_array_equal(tokens["input_ids"].array, [2, 5, 6, 3])
    assert tokens["input_ids"].array.dtype == np.int32


def test_tokenize_a_pair(tokenizer: Path) -> None:
    fields = ["input_ids", "token_type_ids"]
    tokens = apply("tokenize", ("a", "model"), tokenizer=str(tokenizer), max_length=5, fields=fields)
    np.testing.assert_array_equal(tokens["input_ids"], [2, 5, 3, 7, 3])
    np.testing.assert_array_equal(tokens["token_type_ids"], [0, 0, 0, 1, 1])


def test_tokenize_for_a_model_of_two_texts(tokenizer: Path) -> None:
    tokens = apply("tokenize", "a", tokenizer=str(tokenizer), fields=["input_ids"], prefix="left_")
    assert list(tokens) == ["left_input_ids"]


def test_tokenize_says_what_does_not_suit_it(tokenizer: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="tokenize wants text, not int"):
        apply("tokenize", 3, tokenizer=str(tokenizer))
    with pytest.raises(DataError, match=r"this tokenizer gives input_ids, .*, and no 'ids'"):
        apply("tokenize", "a", tokenizer=str(tokenizer), fields=["ids"])
    with pytest.raises(DataError, match="there is no tokenizer folder"):
        apply("tokenize", "a", tokenizer=str(tmp_path / "none"))
    with pytest.raises(DataError, match="transformers cannot read this tokenizer"):
        apply("tokenize", "a", tokenizer=str(tmp_path))


@pytest.mark.parametrize(
    ("package", "step", "extra"),
    [("PIL", {"use": "decode"}, "images"), ("transformers", {"use": "tokenize", "tokenizer": "."}, "transformers")],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, step: dict[str, str], extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # None in sys.modules is what makes an import fail
    monkeypatch.setitem(sys.modules, package, None)
    options = {key: value for key, value in step.items() if key != "use"}
    with pytest.raises(UnavailableError, match=rf"pip install 'optkit\[{extra}\]'"):
        apply(step["use"], b"", **options)
