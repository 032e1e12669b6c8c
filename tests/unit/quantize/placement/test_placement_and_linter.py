"""What is placed in INT8 the linter must find in INT8: ``QuantizeInt8`` promises it, on whatever graph."""

from __future__ import annotations

import numpy as np
import pytest

from optkit.passes.graph_edit import infer_types
from optkit.passes.quantize_int8 import _PROMISES
from optkit.quantize.linter import lint
from optkit.quantize.placement import name_nodes, place
from optkit.quantize.qdq import Quantization, quantize_weights, write
from optkit.quantize.scales import Scale
from optkit.targets.base import ORT_CPU, TENSORRT

SAME = "pads = [1,1,1,1]"


def random_graph(rng):
    """ONNX text and weights: what mobile networks are made of, in any order, read from anywhere."""
    lines, weights, tensors = [], {}, [("x", 16)]

    def weight(*shape):
        name = f"w{len(weights)}"
        weights[name] = rng.standard_normal(shape).astype("f") / 4
        return name

    def add(channels, line):
        name = f"t{len(lines)}"
        lines.append(f"{name} = {line}")
        tensors.append((name, channels))
        return name

    def read():
        return tensors[-1] if rng.random() < 0.6 else tensors[rng.integers(len(tensors))]

    for _ in range(rng.integers(4, 14)):
        (value, channels), kind = read(), rng.integers(12)
        depthwise = f"Conv <group = {channels}, {SAME}> ({value}, %s)"
        if kind < 3:
            add(channels, depthwise % weight(channels, 1, 3, 3))
        elif kind == 3:
            add(out := int(rng.choice([8, 16, 32])), f"Conv ({value}, {weight(out, channels, 1, 1)})")
        elif kind == 4:
            add(16, f"Conv <{SAME}> ({value}, {weight(16, channels, 3, 3)})")
        elif kind == 5:
            add(channels, f"{rng.choice(['Relu', 'HardSwish', 'LeakyRelu'])} ({value})")
        elif kind == 6:
            add(channels, f"Mul ({value}, {add(channels, f'Sigmoid ({value})')})")
        elif kind == 7:
            add(channels, f"MaxPool <kernel_shape = [3,3], {SAME}> ({value})")
        elif kind == 8:
            other, more = read()
            add(channels + more, f"Concat <axis = 1> ({value}, {other})")
        elif kind == 9:
            other = next(name for name, width in reversed(tensors) if width == channels)
            add(channels, f"Add ({value}, {other})")
        elif kind == 10:
            squeezed = add(channels, f"GlobalAveragePool ({value})")
            tensors.pop()  # it has one pixel only, and so has the gate below
            gate = f"Conv ({squeezed}, {weight(channels, channels, 1, 1)})"
            add(channels, f"Mul ({value}, {add(channels, gate)})")
            tensors.pop(-2)
        else:  # what networks hang together by
            block = add(channels, depthwise % weight(channels, 1, 3, 3))
            bent = add(channels, f"Relu ({block})")
            add(16, f"Conv ({bent}, {weight(16, channels, 1, 1)})")
    last, channels = tensors[-1]
    ends = [
        f"pooled = GlobalAveragePool ({last})",
        "flat = Flatten (pooled)",
        f"y = Gemm (flat, {weight(channels, 8)})",
    ]
    return f"g (float[b,16,8,8] x) => (float[b,8] y) {{ {' '.join([*lines, *ends])} }}", weights


@pytest.mark.parametrize("policy", [ORT_CPU, TENSORRT], ids=["onnxruntime", "tensorrt"])
def test_the_linter_finds_in_int8_what_was_placed_there(net, policy):
    placed = grouped = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        text, weights = random_graph(rng)
        model = net(text, **weights)
        infer_types(model.ir)
        name_nodes(model)
        names = [str(node.name) for node in model.ir.graph]
        exclude = list(rng.choice(names, size=min(len(names), rng.integers(1, 4)), replace=False)) * (seed % 2)
        placement = place(model, policy, exclude)
        scale = Scale(np.float32(0.05), 0, policy.activations)
        activations = dict.fromkeys(placement.tensors, scale)
        stored = quantize_weights(model, placement, policy, activations, "max")
        after = write(model, Quantization(placement, activations, stored))
        broken = [found for found in lint(after, policy) if found.is_error or found.rule in _PROMISES]
        assert not [found for found in broken if found.is_error or found.node in placement.int8], f"seed {seed}: {text}"
        placed += bool(placement.weights)
        convolutions = {str(node.name): node for node in model.ir.graph if node.op_type == "Conv"}
        in_int8 = {use.node for use in placement.weights} & convolutions.keys()
        grouped += any("group" in convolutions[name].attributes for name in in_int8)
    assert placed > 100
    assert grouped > 20
