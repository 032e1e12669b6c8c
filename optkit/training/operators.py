"""ONNX operators as PyTorch functions with gradients. This file imports torch: it is imported when a graph is trained.

A function takes a node's attributes and inputs, None for one that is left out, and gives its output, or the tuple of
its outputs. What an operator needs as numbers (shapes, axes, indices of a slice) it reads from tensors on the CPU.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import onnx_ir as ir
import torch
from torch import Tensor
from torch.nn import functional as F

Attributes: TypeAlias = Mapping[str, Any]
Operator: TypeAlias = Callable[..., Any]


def numbers(tensor: Tensor) -> list[int]:
    """A tensor of whole numbers as a list."""
    found: list[int] = tensor.reshape(-1).tolist()
    return found


# --- products and convolutions


def _gemm(a: Attributes, x: Tensor, y: Tensor, z: Tensor | None = None) -> Tensor:
    x, y = (x.t() if a.get("transA") else x), (y.t() if a.get("transB") else y)
    product = x @ y
    alpha, beta = a.get("alpha", 1.0), a.get("beta", 1.0)
    product = product if alpha == 1.0 else alpha * product
    return product if z is None else product + (z if beta == 1.0 else beta * z)


def _conv(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    begins, ends = _pads(a, x.shape[2:], weight.shape[2:], strides, dilations)
    if begins != ends:
        x, begins = F.pad(x, _torch_pads(begins, ends)), [0] * rank
    run: Any = (F.conv1d, F.conv2d, F.conv3d)[rank - 1]
    convolved: Tensor = run(x, weight, bias, strides, begins, dilations, a.get("group", 1))
    return convolved


def _conv_transpose(a: Attributes, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    rank = x.ndim - 2
    strides, dilations = a.get("strides", [1] * rank), a.get("dilations", [1] * rank)
    extra, pads = a.get("output_padding", [0] * rank), a.get("pads", [0] * 2 * rank)
    run: Any = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[rank - 1]
    whole: Tensor = run(x, weight, bias, strides, 0, extra, a.get("group", 1), dilations)
    for axis, (begin, end) in enumerate(zip(pads[:rank], pads[rank:], strict=True), 2):
        whole = whole.narrow(axis, begin, whole.shape[axis] - begin - end)
    return whole


def _pads(
    a: Attributes, sizes: Sequence[int], kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int]
) -> tuple[list[int], list[int]]:
    """How much is put before and behind each spatial axis."""
    how, rank = a.get("auto_pad", "NOTSET"), len(kernel)
    if how in ("NOTSET", "VALID"):
        pads = a.get("pads", [0] * 2 * rank) if how == "NOTSET" else [0] * 2 * rank
        return list(pads[:rank]), list(pads[rank:])
    totals = [
        max((math.ceil(size / stride) - 1) * stride + (k - 1) * dilation + 1 - size, 0)
        for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True)
    ]
    less, more = [total // 2 for total in totals], [total - total // 2 for total in totals]
    return (less, more) if how == "SAME_UPPER" else (more, less)


def _torch_pads(begins: Sequence[int], ends: Sequence[int]) -> list[int]:
    """ONNX lists all begins and all ends, PyTorch pairs of them from the last axis on."""
    pairs = zip(reversed(begins), reversed(ends), strict=True)
    return [pad for pair in pairs for pad in pair]


# --- pools and norms


def _max_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel, strides, dilations, begins, ends = _window(a, x)
    # PyTorch's own padding is the same before and behind, and at most half a window
    if begins != ends or any(2 * pad > size for pad, size in zip(begins, kernel, strict=True)):
        x, begins = F.pad(x, _torch_pads(begins, ends), value=-math.inf), [0] * len(kernel)
    run: Any = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    pooled: Tensor = run(x, kernel, strides, begins, dilations, bool(a.get("ceil_mode", 0)))
    return pooled


def _average_pool(a: Attributes, x: Tensor) -> Tensor:
    kernel, strides, _, begins, ends = _window(a, x)
    run: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    ceil = bool(a.get("ceil_mode", 0))
    if begins == ends:
        pooled: Tensor = run(x, kernel, strides, begins, ceil, bool(a.get("count_include_pad", 0)))
        return pooled
    padded = F.pad(x, _torch_pads(begins, ends))
    means: Tensor = run(padded, kernel, strides, 0, ceil)
    if a.get("count_include_pad", 0):
        return means
    there = F.pad(torch.ones_like(x[:1, :1]), _torch_pads(begins, ends))
    share: Tensor = run(there, kernel, strides, 0, ceil)
    return means / share


def _window(a: Attributes, x: Tensor) -> tuple[list[int], list[int], list[int], list[int], list[int]]:
    kernel = list(a["kernel_shape"])
    strides, dilations = a.get("strides", [1] * len(kernel)), a.get("dilations", [1] * len(kernel))
    begins, ends = _pads(a, x.shape[2:], kernel, strides, dilations)
    return kernel, list(strides), list(dilations), begins, ends


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def _batch_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, eps=a.get("epsilon", 1e-5))


def _layer_norm(a: Attributes, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    shape = x.shape[a.get("axis", -1) :]
    shift = None if bias is None else bias.broadcast_to(shape)
    return F.layer_norm(x, shape, scale.broadcast_to(shape), shift, a.get("epsilon", 1e-5))


def _prelu(a: Attributes, x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, slope * x, x)


# --- elementwise


def _divide(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return x / y if x.is_floating_point() else torch.div(x, y, rounding_mode="trunc")


def _clip(a: Attributes, x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    return x if low is None and high is None else torch.clamp(x, low, high)


def _modulo(a: Attributes, x: Tensor, y: Tensor) -> Tensor:
    return torch.fmod(x, y) if a.get("fmod") else torch.remainder(x, y)


def _mean(a: Attributes, *values: Tensor) -> Tensor:
    return functools.reduce(torch.add, values) / len(values)


def _cast(a: Attributes, x: Tensor) -> Tensor:
    return x.to(TYPES[ir.DataType(a["to"])])


TYPES = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.BOOL: torch.bool,
}
"""PyTorch's name of an ONNX type."""


# --- reductions


def _reduction(function: Callable[[Tensor, list[int], bool], Tensor]) -> Operator:
    """Axes are an input since opset 13 or 18, and an attribute before."""

    def run(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
        wanted = numbers(axes) if axes is not None else list(a.get("axes", ()))
        if not wanted:
            if a.get("noop_with_empty_axes"):
                return x
            wanted = list(range(x.ndim))
        return function(x, wanted, bool(a.get("keepdims", 1)))

    return run


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted((axis % x.ndim for axis in axes), reverse=True):
        x = x.prod(axis, keepdim=keep)
    return x


def _arg(function: Any) -> Operator:
    def run(a: Attributes, x: Tensor) -> Tensor:
        found: Tensor = function(x, a.get("axis", 0), bool(a.get("keepdims", 1)))
        return found

    return run


# --- shapes


def _reshape(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    sizes = numbers(shape)
    if not a.get("allowzero"):
        sizes = [x.shape[axis] if size == 0 else size for axis, size in enumerate(sizes)]
    return x.reshape(sizes)


def _flatten(a: Attributes, x: Tensor) -> Tensor:
    axis = a.get("axis", 1)
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


def _transpose(a: Attributes, x: Tensor) -> Tensor:
    return x.permute(*a.get("perm", reversed(range(x.ndim))))


def _squeeze(a: Attributes, x: Tensor, axes: Tensor | None = None) -> Tensor:
    return x.squeeze() if axes is None else x.squeeze(tuple(numbers(axes)))


def _unsqueeze(a: Attributes, x: Tensor, axes: Tensor) -> Tensor:
    wanted = numbers(axes)
    rank = x.ndim + len(wanted)
    for axis in sorted(axis % rank for axis in wanted):
        x = x.unsqueeze(axis)
    return x


def _split(a: Attributes, x: Tensor, sizes: Tensor | None = None) -> tuple[Tensor, ...]:
    axis, size = a.get("axis", 0), x.shape[a.get("axis", 0)]
    return torch.split(x, numbers(sizes) if sizes is not None else math.ceil(size / a["num_outputs"]), axis)


def _slice(
    a: Attributes, x: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    count = starts.numel()
    along = range(count) if axes is None else numbers(axes)
    strides = [1] * count if steps is None else numbers(steps)
    for axis, start, end, step in zip(along, numbers(starts), numbers(ends), strides, strict=True):
        chosen = range(*slice(start, end, step).indices(x.shape[axis]))
        if step > 0:
            x = x[(slice(None),) * (axis % x.ndim) + (slice(chosen.start, chosen.stop, step),)]
        else:
            x = x.index_select(axis, torch.tensor(list(chosen), dtype=torch.int64, device=x.device))
    return x


def _gather(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0) % x.ndim
    picked = x.index_select(axis, _from_front(indices.reshape(-1), x.shape[axis]))
    return picked.reshape(*x.shape[:axis], *indices.shape, *x.shape[axis + 1 :])


def _gather_elements(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    axis = a.get("axis", 0)
    return x.gather(axis, _from_front(indices, x.shape[axis]).long())


def _gather_nd(a: Attributes, x: Tensor, indices: Tensor) -> Tensor:
    batch, shape = a.get("batch_dims", 0), indices.shape[:-1]
    each = [
        torch.arange(size, device=x.device).reshape([-1] + [1] * (len(shape) - axis - 1)).expand(shape)
        for axis, size in enumerate(shape[:batch])
    ]
    where = (*each, *indices.unbind(-1))
    return x[where]


def _from_front(indices: Tensor, size: int) -> Tensor:
    return torch.where(indices < 0, indices + size, indices)


def _expand(a: Attributes, x: Tensor, shape: Tensor) -> Tensor:
    both = torch.broadcast_shapes(x.shape, numbers(shape))  # type: ignore[no-untyped-call]
    return x.expand(both)


def _tile(a: Attributes, x: Tensor, repeats: Tensor) -> Tensor:
    return x.repeat(numbers(repeats))


def _pad(a: Attributes, x: Tensor, pads: Tensor, value: Tensor | None = None, axes: Tensor | None = None) -> Tensor:
    given, along = numbers(pads), range(x.ndim) if axes is None else numbers(axes)
    begins, ends = [0] * x.ndim, [0] * x.ndim
    for axis, begin, end in zip(along, given[: len(along)], given[len(along) :], strict=True):
        begins[axis], ends[axis] = begin, end
    mode = {"constant": "constant", "reflect": "reflect", "edge": "replicate", "wrap": "circular"}[
        a.get("mode", "constant")
    ]
    if mode == "constant":
        return F.pad(x, _torch_pads(begins, ends), value=0 if value is None else value.item())
    # PyTorch pads the last axes only in these modes: those in front that stay as they are do not count
    first = next((axis for axis in range(x.ndim) if begins[axis] or ends[axis]), x.ndim)
    return F.pad(x, _torch_pads(begins[first:], ends[first:]), mode) if first < x.ndim else x


def _shape(a: Attributes, x: Tensor) -> Tensor:
    return torch.tensor(x.shape[a.get("start", 0) : a.get("end")], dtype=torch.int64)


def _constant(a: Attributes) -> Tensor:
    (value,) = a.values()
    return value if isinstance(value, Tensor) else torch.tensor(value)


def _constant_of_shape(a: Attributes, shape: Tensor) -> Tensor:
    value = a.get("value", torch.zeros(1))
    return torch.full(numbers(shape), value.item(), dtype=value.dtype)


def _range(a: Attributes, start: Tensor, limit: Tensor, step: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), step.item(), dtype=start.dtype)


def _triangle(a: Attributes, x: Tensor, k: Tensor | None = None) -> Tensor:
    offset = 0 if k is None else int(k.item())
    return x.triu(offset) if a.get("upper", 1) else x.tril(offset)


def _depth_to_space(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    if a.get("mode", "DCR") == "CRD":
        return F.pixel_shuffle(x, b)
    parts = x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2)
    return parts.reshape(n, c // b**2, h * b, w * b)


def _space_to_depth(a: Attributes, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = a["blocksize"]
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


def _elementwise(function: Callable[..., Tensor]) -> Operator:
    return lambda a, *inputs: function(*inputs)


def _variadic(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    return lambda a, *inputs: functools.reduce(function, inputs)


OPERATORS: Mapping[str, Operator] = {
    "Abs": _elementwise(torch.abs),
    "Add": _elementwise(torch.add),
    "And": _elementwise(torch.logical_and),
    "ArgMax": _arg(torch.argmax),
    "ArgMin": _arg(torch.argmin),
    "AveragePool": _average_pool,
    "BatchNormalization": _batch_norm,
    "Cast": _cast,
    "CastLike": lambda a, x, like: x.to(like.dtype),
    "Ceil": _elementwise(torch.ceil),
    "Celu": lambda a, x: F.celu(x, a.get("alpha", 1.0)),
    "Clip": _clip,
    "Concat": lambda a, *inputs: torch.cat(inputs, a["axis"]),
    "Constant": _constant,
    "ConstantOfShape": _constant_of_shape,
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Cos": _elementwise(torch.cos),
    "CumSum": lambda a, x, axis: x.cumsum(int(axis.item())),
    "DepthToSpace": _depth_to_space,
    "Div": _divide,
    "Dropout": lambda a, x, *rest: x,
    "Einsum": lambda a, *inputs: torch.einsum(a["equation"], *inputs),
    "Elu": lambda a, x: F.elu(x, a.get("alpha", 1.0)),
    "Equal": _elementwise(torch.eq),
    "Erf": _elementwise(torch.erf),
    "Exp": _elementwise(torch.exp),
    "Expand": _expand,
    "Flatten": _flatten,
    "Floor": _elementwise(torch.floor),
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Gelu": lambda a, x: F.gelu(x, approximate=a.get("approximate", "none")),
    "Gemm": _gemm,
    "GlobalAveragePool": lambda a, x: x.mean(_spatial(x), keepdim=True),
    "GlobalMaxPool": lambda a, x: x.amax(_spatial(x), keepdim=True),
    "Greater": _elementwise(torch.gt),
    "GreaterOrEqual": _elementwise(torch.ge),
    "HardSigmoid": lambda a, x: (a.get("alpha", 0.2) * x + a.get("beta", 0.5)).clamp(0, 1),
    "HardSwish": _elementwise(F.hardswish),
    "Identity": lambda a, x: x,
    "InstanceNormalization": lambda a, x, scale, bias: F.instance_norm(
        x, weight=scale, bias=bias, eps=a.get("epsilon", 1e-5)
    ),
    "IsInf": _elementwise(torch.isinf),
    "IsNaN": _elementwise(torch.isnan),
    "LayerNormalization": _layer_norm,
    "LeakyRelu": lambda a, x: F.leaky_relu(x, a.get("alpha", 0.01)),
    "Less": _elementwise(torch.lt),
    "LessOrEqual": _elementwise(torch.le),
    "Log": _elementwise(torch.log),
    "LogSoftmax": lambda a, x: F.log_softmax(x, a.get("axis", -1)),
    "MatMul": _elementwise(torch.matmul),
    "Max": _variadic(torch.maximum),
    "MaxPool": _max_pool,
    "Mean": _mean,
    "Min": _variadic(torch.minimum),
    "Mish": _elementwise(F.mish),
    "Mod": _modulo,
    "Mul": _elementwise(torch.mul),
    "Neg": _elementwise(torch.neg),
    "Not": _elementwise(torch.logical_not),
    "Or": _elementwise(torch.logical_or),
    "PRelu": _prelu,
    "Pad": _pad,
    "Pow": lambda a, x, y: x.pow(y.to(x.dtype)),
    "Range": _range,
    "Reciprocal": _elementwise(torch.reciprocal),
    "ReduceL1": _reduction(lambda x, axes, keep: x.abs().sum(axes, keepdim=keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep)),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMean": _reduction(lambda x, axes, keep: x.mean(axes, keepdim=keep)),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(lambda x, axes, keep: x.sum(axes, keepdim=keep, dtype=x.dtype)),
    "ReduceSumSquare": _reduction(lambda x, axes, keep: x.square().sum(axes, keepdim=keep)),
    "Relu": _elementwise(torch.relu),
    "Reshape": _reshape,
    "Round": _elementwise(torch.round),
    "Selu": _elementwise(F.selu),
    "Shape": _shape,
    "Sigmoid": _elementwise(torch.sigmoid),
    "Sign": _elementwise(torch.sign),
    "Sin": _elementwise(torch.sin),
    "Size": lambda a, x: torch.tensor(x.numel()),
    "Slice": _slice,
    "Softmax": lambda a, x: x.softmax(a.get("axis", -1)),
    "Softplus": _elementwise(F.softplus),
    "Softsign": _elementwise(F.softsign),
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Sqrt": _elementwise(torch.sqrt),
    "Squeeze": _squeeze,
    "Sub": _elementwise(torch.sub),
    "Sum": _variadic(torch.add),
    "Tanh": _elementwise(torch.tanh),
    "Tile": _tile,
    "Transpose": _transpose,
    "Trilu": _triangle,
    "Unsqueeze": _unsqueeze,
    "Where": _elementwise(torch.where),
    "Xor": _elementwise(torch.logical_xor),
}
"""By the name of the operator in ai.onnx, opset 13 or later; with inference's semantics where training's differ."""

ON_CPU: Mapping[str, frozenset[int]] = {
    "ConstantOfShape": frozenset({0}),
    "CumSum": frozenset({1}),
    "Expand": frozenset({1}),
    "Pad": frozenset({1, 2, 3}),
    "Range": frozenset({0, 1, 2}),
    "Reshape": frozenset({1}),
    "Slice": frozenset({1, 2, 3, 4}),
    "Split": frozenset({1}),
    "Squeeze": frozenset({1}),
    "Tile": frozenset({1}),
    "Trilu": frozenset({1}),
    "Unsqueeze": frozenset({1}),
} | dict.fromkeys((name for name in OPERATORS if name.startswith("Reduce")), frozenset({1}))
"""Inputs that are read as numbers, so a GPU must not be waited for."""


def unsupported(node: ir.Node) -> str | None:
    """Why a node has no function here, or None if it has one."""
    if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
        return f"there is no {node.op_type} in PyTorch's table"
    several = [value for value in node.outputs[1:] if value.uses() or value.is_graph_output()]
    if several and node.op_type != "Split":
        return f"only the first output of a {node.op_type} is known"
    training = node.attributes.get("training_mode")
    if training is not None and training.as_int():
        return f"its {node.op_type} is in training mode"
    plain = {"CumSum": ("exclusive", "reverse"), "ArgMax": ("select_last_index",), "ArgMin": ("select_last_index",)}
    odd = [name for name in plain.get(node.op_type, ()) if name in node.attributes and node.attributes[name].as_int()]
    if odd:
        return f"its attribute {odd[0]} is not known"
    if node.op_type == "ConvTranspose" and ("output_shape" in node.attributes or "auto_pad" in node.attributes):
        return "its output_shape or auto_pad is not known"
    return None
