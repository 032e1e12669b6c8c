"""Dynamic quantization: products with a constant find the range of what they read at each call.

``activations: auto`` prefers it to calibrated ranges, since ONNX Runtime adds the bias inside of these kernels. On
MiniLM of ``benchmarks/int8``, smoothed, batch 1, one thread of an AMD EPYC without VNNI (processor time, 41 interleaved
rounds), it is 1.05 times as fast as static with 16 tokens [1.03, 1.07] and with 64 [1.02, 1.07], 1.02 times with 128
[0.98, 1.06]; the SQNR of the logits is 34.0 dB one sample at a time and 32.3 with 32, instead of 34.4. On an EPYC with
VNNI, ONNX Runtime's own dynamic quantization was 2.44 times as fast as FP32, and a smoothed static one 2.30 times.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from optkit.quantize.placement.draft import Draft
from optkit.quantize.placement.graph import weight_axis, weight_problem

if TYPE_CHECKING:
    import onnx_ir as ir


def dynamic_inputs(node: ir.Node, draft: Draft) -> bool:
    """``MatMul`` and ``Gemm`` read UINT8 of the range that the call has, and write float.

    What reads INT8 of a calibrated range, as after a convolution, has nothing to find.
    """
    if node.op_type not in ("MatMul", "Gemm") or draft.is_int8(node.inputs[0]):
        return False
    problem = weight_problem(node)
    if problem is not None:
        draft.keep_float(node, problem)
        return True
    draft.quantize_at_run_time(node)
    draft.quantize_weight(node, weight_axis(node))
    return True
