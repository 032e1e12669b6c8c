"""onnxruntime.quantization, static or dynamic, after its own documented preprocessing."""

from __future__ import annotations

import tempfile
from pathlib import Path

from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.shape_inference import quant_pre_process
from samples import Samples, arguments

ENUMS = {"activation_type": QuantType, "weight_type": QuantType, "calibrate_method": CalibrationMethod}


class Reader(CalibrationDataReader):
    def __init__(self, samples: Samples) -> None:
        self._rest = samples.batches()

    def get_next(self):
        return next(self._rest, None)


def main() -> None:
    model, samples, out, options = arguments()
    options = {key: ENUMS[key][value] if key in ENUMS else value for key, value in options.items()}
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        prepared = Path(scratch) / "prepared.onnx"
        # Symbolic shape inference fails on transformers with a dynamic batch
        quant_pre_process(model, prepared, skip_symbolic_shape=True)
        if options.pop("dynamic", False):
            quantize_dynamic(prepared, out, **options)
        else:
            quantize_static(prepared, out, Reader(samples), **options)


if __name__ == "__main__":
    main()
