"""NVIDIA ModelOpt's INT8 quantization of an ONNX model; it places Q/DQ for TensorRT."""

from __future__ import annotations

import numpy as np
from modelopt.onnx.quantization import quantize
from samples import arguments


def main() -> None:
    model, samples, out, options = arguments()
    quantize(
        str(model),
        quantize_mode="int8",
        calibration_data={name: np.asarray(array) for name, array in samples.arrays.items()},
        calibration_shapes=",".join(
            f"{name}:{'x'.join(map(str, (1, *array.shape[1:])))}" for name, array in samples.arrays.items()
        ),
        calibration_eps=["cpu"],
        # What stays in float stays in FP32, as with everyone else; the default is FP16
        high_precision_dtype="fp32",
        output_path=str(out),
        **options,
    )


if __name__ == "__main__":
    main()
