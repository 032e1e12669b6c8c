"""Graphs for every operator that can be trained: statements that make ``z`` of the inputs and constants below."""

from __future__ import annotations

import numpy as np

_RNG = np.random.default_rng(0)

INPUTS = {
    "x": _RNG.standard_normal((2, 4, 6, 6)).astype("f"),
    "y": _RNG.standard_normal((2, 4, 6, 6)).astype("f"),
    "p": _RNG.uniform(0.1, 3, (2, 4, 6, 6)).astype("f"),
    "m": _RNG.standard_normal((3, 6)).astype("f"),
    "i": np.array([[0, -1, 3], [1, 0, -2]]),
    "b": _RNG.random((2, 4, 6, 6)) < 0.5,
    "c": _RNG.random(6) < 0.5,
}

CONSTANTS = {
    "k": _RNG.standard_normal((8, 2, 3, 3)).astype("f"),
    "t": _RNG.standard_normal((4, 3, 3, 2)).astype("f"),
    "v": _RNG.uniform(0.5, 1.5, 4).astype("f"),
    "w": _RNG.standard_normal(4).astype("f"),
    "e": _RNG.standard_normal(8).astype("f"),
    "r": _RNG.standard_normal((6, 5)).astype("f"),
    "s": _RNG.standard_normal(5).astype("f"),
    "along": np.array([[0, -1, 3, 2, 1, 5]] * 3),
    "places": np.array([[[1], [-2]], [[0], [3]]]),
}


def _ints(name: str, *values: int) -> str:
    return f"{name} = Constant <value_ints = [{', '.join(map(str, values))}]> () "


def _int(name: str, value: int) -> str:
    return f"{name} = Constant <value_int = {value}> () "


def _float(name: str, value: float) -> str:
    return f"{name} = Constant <value_float = {value}> () "


_OF_X = """Abs ArgMax ArgMin Ceil Celu Cos Dropout Erf Exp Floor GlobalAveragePool GlobalMaxPool HardSwish Identity
LogSoftmax Mish Neg ReduceL1 ReduceL2 ReduceLogSumExp ReduceMax ReduceMin ReduceSum ReduceSumSquare Relu Round Selu
Sigmoid Sign Sin Size Softplus Softsign Tanh"""
_OF_P = "Log Reciprocal Sqrt"
_OF_BOTH = "Add Equal Greater GreaterOrEqual Less LessOrEqual Max Mean Min Mul Sub Sum"

CASES: dict[str, tuple[str, ...]] = {
    **{op: (f"z = {op}(x)",) for op in _OF_X.split()},
    **{op: (f"z = {op}(p)",) for op in _OF_P.split()},
    **{op: (f"z = {op}(x, y)",) for op in _OF_BOTH.split()},
    "And": ("z = And(b, c)",),
    "ArgMax": ("z = ArgMax <axis = -1, keepdims = 0> (x)",),
    "AveragePool": (
        "z = AveragePool <kernel_shape = [2, 2], strides = [2, 2]> (x)",
        "z = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)",
        "z = AveragePool <kernel_shape = [3, 3], pads = [1, 0, 1, 2], count_include_pad = 1> (x)",
        "z = AveragePool <kernel_shape = [3, 3], pads = [0, 0, 1, 2], strides = [2, 2]> (x)",
        'z = AveragePool <kernel_shape = [2, 2], auto_pad = "SAME_UPPER"> (x)',
    ),
    "BatchNormalization": ("z = BatchNormalization <epsilon = 0.01> (x, v, w, w, v)",),
    "Cast": ("z = Cast <to = 7> (p)", "z = Cast <to = 1> (b)", "z = Cast <to = 9> (i)", "z = Cast <to = 10> (x)"),
    "CastLike": ("z = CastLike(p, i)",),
    "Clip": (
        _float("low", -0.5) + _float("high", 0.7) + "z = Clip(x, low, high)",
        _float("low", 0.1) + "z = Clip(x, low)",
        _float("high", 0.1) + "z = Clip(x, , high)",
        "z = Clip(x)",
    ),
    "Concat": ("z = Concat <axis = -1> (x, y, p)",),
    "Constant": ("q = Constant <value = float[2] {1.5, 2.5}> () z = Neg(q)",),
    "ConstantOfShape": (
        "q = Shape(x) z = ConstantOfShape <value = float[1] {2.5}> (q)",
        "q = Shape(m) z = ConstantOfShape(q)",
    ),
    "Conv": (
        "z = Conv <group = 2> (x, k, e)",
        "z = Conv <group = 2, pads = [1, 0, 2, 1], strides = [2, 1], dilations = [1, 2]> (x, k)",
        'z = Conv <group = 2, auto_pad = "SAME_LOWER", strides = [2, 2]> (x, k)',
        'z = Conv <group = 2, auto_pad = "VALID"> (x, k)',
    ),
    "ConvTranspose": (
        "z = ConvTranspose(x, t)",
        "z = ConvTranspose <strides = [2, 2], pads = [1, 0, 0, 1], output_padding = [1, 1]> (x, t)",
    ),
    "CumSum": (_int("axis", 1) + "z = CumSum(x, axis)",),
    "DepthToSpace": ("z = DepthToSpace <blocksize = 2> (x)", 'z = DepthToSpace <blocksize = 2, mode = "CRD"> (x)'),
    "Div": ("z = Div(x, p)", _ints("d", 2, 3, 2) + "z = Div(i, d)"),
    "Einsum": ('z = Einsum <equation = "bchw,mw->bmc"> (x, m)',),
    "Elu": ("z = Elu <alpha = 0.5> (x)",),
    "Expand": (_ints("shape", 2, 1, 3, 6) + "z = Expand(m, shape)", _ints("shape", 3, 1) + "z = Expand(m, shape)"),
    "Flatten": ("z = Flatten <axis = 2> (x)", "z = Flatten <axis = 0> (x)"),
    "Gather": ("z = Gather <axis = 1> (x, i)", "z = Gather <axis = -3> (x, i)"),
    "GatherElements": ("z = GatherElements <axis = 1> (m, along)",),
    "GatherND": ("z = GatherND(x, i)", "z = GatherND <batch_dims = 1> (x, places)"),
    "Gelu": ("z = Gelu(x)", 'z = Gelu <approximate = "tanh"> (x)'),
    "Gemm": (
        "z = Gemm(m, r, s)",
        "z = Gemm <alpha = 0.5, beta = 2.0> (m, r, s)",
        "q = Transpose(m) z = Gemm <transA = 1> (q, r)",
        "q = Transpose(r) z = Gemm <transB = 1> (m, q)",
    ),
    "HardSigmoid": ("z = HardSigmoid <alpha = 0.3, beta = 0.4> (x)",),
    "InstanceNormalization": ("z = InstanceNormalization(x, v, w)",),
    "IsInf": (_float("zero", 0.0) + "q = Div(p, zero) z = IsInf(q)",),
    "IsNaN": (_float("zero", 0.0) + "q = Div(zero, zero) d = Add(q, x) z = IsNaN(d)",),
    "LayerNormalization": (
        "q = Transpose <perm = [0, 2, 3, 1]> (x) z = LayerNormalization <axis = -1> (q, v, w)",
        "q = Transpose <perm = [0, 2, 3, 1]> (x) z = LayerNormalization <axis = 2> (q, v)",
    ),
    "LeakyRelu": ("z = LeakyRelu <alpha = 0.2> (x)",),
    "MatMul": ("z = MatMul(x, r)", "z = MatMul(x, y)"),
    "MaxPool": (
        "z = MaxPool <kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]> (x)",
        "z = MaxPool <kernel_shape = [2, 2], pads = [0, 1, 1, 0]> (x)",
        "z = MaxPool <kernel_shape = [2, 2], pads = [1, 1, 1, 1], dilations = [2, 2]> (x)",
        "z = MaxPool <kernel_shape = [3, 3], strides = [2, 2], ceil_mode = 1> (x)",
    ),
    "Mod": (_ints("d", 2, 3, 2) + "z = Mod(i, d)", "z = Mod <fmod = 1> (x, p)"),
    "Not": ("z = Not(b)",),
    "Or": ("z = Or(b, c)",),
    "PRelu": (_ints("axes", 1, 2) + "q = Unsqueeze(v, axes) z = PRelu(x, q)",),
    "Pad": (
        _ints("pads", 0, 0, 1, 2, 0, 1, 0, 3) + _float("value", 1.5) + "z = Pad(x, pads, value)",
        _ints("pads", 1, 2) + _ints("axes", -1) + "z = Pad(x, pads, , axes)",
        _ints("pads", 0, 0, 1, 2, 0, 0, 0, 3) + 'z = Pad <mode = "reflect"> (x, pads)',
        _ints("pads", 0, 0, 1, 2, 0, 0, 0, 3) + 'z = Pad <mode = "edge"> (x, pads)',
    ),
    "Pow": (_float("q", 2.0) + "z = Pow(x, q)", _int("q", 3) + "z = Pow(x, q)"),
    "Range": (_int("start", 1) + _int("limit", 8) + _int("step", 3) + "z = Range(start, limit, step)",),
    "ReduceMean": (
        _ints("axes", 2, -1) + "z = ReduceMean(x, axes)",
        _ints("axes", 1) + "z = ReduceMean <keepdims = 0> (x, axes)",
        "z = ReduceMean <noop_with_empty_axes = 1> (x)",
    ),
    "ReduceProd": (_ints("axes", 1, -1) + "z = ReduceProd <keepdims = 0> (x, axes)", "z = ReduceProd(m)"),
    "Reshape": (_ints("shape", 0, -1, 6) + "z = Reshape(x, shape)",),
    "Shape": ("z = Shape(x)", "z = Shape <start = 1, end = -1> (x)"),
    "Slice": (
        _ints("s1", 1, -3) + _ints("s2", 4, 1000) + _ints("s3", 1, -1) + "z = Slice(x, s1, s2, s3)",
        _ints("s1", -1, 0)
        + _ints("s2", -1000, 5)
        + _ints("s3", 2, 3)
        + _ints("s4", -2, 2)
        + "z = Slice(x, s1, s2, s3, s4)",
        _ints("s1", 1) + _ints("s2", 2) + "z = Slice(x, s1, s2)",
    ),
    "Softmax": ("z = Softmax(x)", "z = Softmax <axis = 1> (x)"),
    "SpaceToDepth": ("z = SpaceToDepth <blocksize = 2> (x)",),
    "Split": (
        "z, z2 = Split <axis = 1, num_outputs = 2> (x)",
        _ints("sizes", 1, 3) + "z, z2 = Split <axis = 1> (x, sizes)",
        "q, q2, z, z2 = Split <axis = -1, num_outputs = 4> (x)",
    ),
    "Squeeze": (
        _ints("axes", 2, -1) + "q = GlobalAveragePool(x) z = Squeeze(q, axes)",
        "q = GlobalMaxPool(x) z = Squeeze(q)",
    ),
    "Tile": (_ints("repeats", 1, 2, 1, 3) + "z = Tile(x, repeats)",),
    "Transpose": ("z = Transpose(m)", "z = Transpose <perm = [0, 3, 1, 2]> (x)"),
    "Trilu": ("z = Trilu(x)", _int("q", -1) + "z = Trilu <upper = 0> (x, q)"),
    "Unsqueeze": (_ints("axes", 0, -1) + "z = Unsqueeze(m, axes)",),
    "Where": ("z = Where(b, x, y)",),
    "Xor": ("z = Xor(b, c)",),
}
