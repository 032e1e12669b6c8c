from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.leave_clips_to_quantizers import LeaveClipsToQuantizers
from optkit.targets.onnxruntime import open_onnx

SCALE = 0.047
STEPS = np.arange(-1.5, 1.75, 0.25)
"""How far a bound is from the last number that the quantizer has, in numbers."""


@pytest.mark.parametrize(("kind", "zero"), [("int8", 0), ("int8", -128), ("int8", 5), ("uint8", 0), ("uint8", 3)])
def test_no_number_changes_whatever_the_bounds(onnx_model, context, kind, zero):
    least, most = np.iinfo(kind).min - zero, np.iinfo(kind).max - zero
    feeds = {"x": np.linspace(SCALE * (least - 9), SCALE * (most + 9), 9999, dtype=np.float32)}
    seen = set()
    for low, high in [(0, most + step) for step in STEPS] + [(least + step, most + 1) for step in STEPS]:
        model = onnx_model(
            f"""g (float[9999] x) => (float[9999] y)
            <float s = {{{SCALE}}}, {kind} z = {{{zero}}},
              float l = {{{SCALE * low:.9g}}}, float h = {{{SCALE * high:.9g}}}> {{
                a = Clip(x, l, h) q = QuantizeLinear(a, s, z) y = DequantizeLinear(q, s, z) }}"""
        )
        edited = LeaveClipsToQuantizers().run(model, context)
        seen.add(next(iter(edited.ir.graph)).op_type)
        wanted, found = (open_onnx(m, optimize=False).run(feeds)["y"] for m in (model, edited))
        np.testing.assert_array_equal(found, wanted)
    assert seen >= {"Clip", "QuantizeLinear"} and ("Relu" in seen) == (least < 0)
