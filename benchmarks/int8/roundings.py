"""How far apart are two runtimes that both compute an INT8 graph rightly, and only round in other places?

    python benchmarks/int8/roundings.py BUNDLE…        # bundles of `optkit compile … --precision int8`

The ONNX model of each bundle runs on the validation samples of its recipe in three ways: in float32 as it is written,
with every value of FP16 rounded, and with ONNX Runtime's own optimizer, which puts integer kernels in place of Q/DQ.
The cosine between the first and the others is what agreement with an engine can be expected at best.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import optkit
from optkit.context import Context
from optkit.data import open_data
from optkit.emulation import halves_in_float32
from optkit.models import OnnxModel
from optkit.numerics import compare
from optkit.passes.widen_to_float32 import WidenToFloat32
from optkit.targets.onnxruntime import OnnxRuntimeTarget, open_onnx


def outputs(
    model: OnnxModel, batches: list[dict[str, np.ndarray]], threads: int, optimize: bool
) -> dict[str, np.ndarray]:
    """The outputs of all batches by name."""
    with open_onnx(model, threads, optimize=optimize) as runner:
        found = [runner.run(feeds) for feeds in batches]
    return {name: np.concatenate([batch[name] for batch in found]) for name in found[0]}


def main() -> None:
    """Print a line for each bundle and way."""
    import onnx_ir as ir

    parser = argparse.ArgumentParser()
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--samples", type=int, default=320)
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args()
    for path in chosen.bundles:
        bundle = optkit.load(path)
        model = OnnxModel(ir.load(path / "model.onnx"), bundle.signature)
        samples = open_data(bundle.recipe.data).batches("validation", 8, chosen.samples)
        batches = [batch.feeds for batch in samples]
        wide = WidenToFloat32().run(model, Context(OnnxRuntimeTarget(), path, threads=chosen.threads))
        wanted = outputs(wide, batches, chosen.threads, optimize=False)
        for way, other, optimize in (
            ("halves rounded", halves_in_float32(model), False),
            ("ONNX Runtime's integer kernels", wide, True),
        ):
            print(f"{path.name:32} {way:32} {compare(wanted, outputs(other, batches, chosen.threads, optimize))}")


if __name__ == "__main__":
    main()
