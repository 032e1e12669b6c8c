"""optkit's ``quantize_int8``, with what the recipe would do before it already done by prepare.py."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

from pydantic import TypeAdapter
from samples import Samples, arguments

from optkit.bundle import save_onnx
from optkit.context import Context
from optkit.data import Batch, Split
from optkit.metrics import Cosine
from optkit.models import OnnxModel, TensorSpec
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import run_passes
from optkit.recipe import Recipe
from optkit.source import load_model
from optkit.targets import AnyTarget


class CalibrationData:
    """The samples as optkit's ``Data``; there are none to validate."""

    metric = Cosine()

    def __init__(self, samples: Samples) -> None:
        self._samples = samples
        self.inputs = tuple(
            TensorSpec(name, array.dtype.name, ("batch", *array.shape[1:])) for name, array in samples.arrays.items()
        )

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        arrays, count = self._samples.arrays, min(limit or len(self._samples), len(self._samples))
        for start in range(0, count if split == "calibration" else 0, size):
            yield Batch({name: array[start : min(start + size, count)] for name, array in arrays.items()}, None)

    def fingerprint(self, split: Split) -> dict[str, object]:
        return {"split": split, "count": len(self._samples)}


def main() -> None:
    path, samples, out, options = arguments()
    target = TypeAdapter(AnyTarget).validate_python({"name": options.pop("target", "onnxruntime")})
    data = CalibrationData(samples)
    model = load_model(path, Recipe.load("int8"), data.inputs).model
    steps = (QuantizeInt8.model_validate(options),)
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        stages = run_passes(steps, model, Context(target, Path(scratch), data))
    quantized = stages[-1].model
    assert isinstance(quantized, OnnxModel)
    save_onnx(quantized, out)
    out.with_suffix(".record.json").write_text(json.dumps(quantized.records.get("quantization", {})))


if __name__ == "__main__":
    main()
