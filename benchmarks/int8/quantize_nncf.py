"""NNCF's post-training quantization of an ONNX model."""

from __future__ import annotations

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters
from nncf.quantization.range_estimator import RangeEstimatorParametersSet
from samples import arguments


def main() -> None:
    model, samples, out, options = arguments()
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])
    if "ranges" in options:
        ranges = getattr(RangeEstimatorParametersSet, options.pop("ranges"))
        options["advanced_parameters"] = AdvancedQuantizationParameters(activations_range_estimator_params=ranges)
    dataset = nncf.Dataset(list(samples.batches()))
    quantized = nncf.quantize(onnx.load(model), dataset, subset_size=len(samples), **options)
    onnx.save(quantized, out)


if __name__ == "__main__":
    main()
