"""NNCF's post-training quantization of an ONNX model."""

from __future__ import annotations

import nncf
import onnx
from nncf.quantization.advanced_parameters import AdvancedQuantizationParameters, OverflowFix
from samples import arguments


def main() -> None:
    model, samples, out, options = arguments()
    if "model_type" in options:
        options["model_type"] = nncf.ModelType(options["model_type"])
    if "overflow_fix" in options:
        fix = OverflowFix(options.pop("overflow_fix"))
        options["advanced_parameters"] = AdvancedQuantizationParameters(overflow_fix=fix)
    dataset = nncf.Dataset(list(samples.batches()))
    quantized = nncf.quantize(onnx.load(model), dataset, subset_size=len(samples), **options)
    onnx.save(quantized, out)


if __name__ == "__main__":
    main()
