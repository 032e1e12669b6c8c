"""Fixtures of the INT8 tests: networks with weights, and data from arrays."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from optkit.data import Data, Split
from optkit.metrics import Batch, Cosine, Metric
from optkit.models import OnnxModel, Signature, TensorSpec

Array = np.ndarray[Any, Any]


class ArrayData:
    """The same arrays for every split, batched; what the data layer promises, without files."""

    def __init__(self, feeds: Mapping[str, Array], shared: bool = False) -> None:
        self.inputs: tuple[TensorSpec, ...] = ()
        self.metric: Metric = Cosine()
        self._feeds, self._shared = feeds, shared

    def batches(self, split: Split, size: int, limit: int | None = None) -> Iterator[Batch]:
        count = min(map(len, self._feeds.values()))
        count = count if limit is None else min(count, limit)
        for start in range(0, count, size):
            yield Batch({name: array[start : min(start + size, count)] for name, array in self._feeds.items()}, None)

    def fingerprint(self, split: Split) -> dict[str, Any]:
        return {"source": "arrays"} if self._shared else {"source": "arrays", "split": split}


@pytest.fixture
def array_data() -> Callable[..., Data]:
    """Data from arrays by input name."""
    return ArrayData


@pytest.fixture
def net() -> Callable[..., OnnxModel]:
    """Make a model from ONNX text and the arrays of its initializers: ``net("g (...) => (...) {...}", w=array)``."""

    def make(text: str, opset: int = 20, **arrays: Array) -> OnnxModel:
        proto = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["" : {opset}]> {text}')
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
        model = ir.from_proto(onnx.shape_inference.infer_shapes(proto))
        specs = [
            [
                TensorSpec(
                    str(v.name), str(v.dtype.numpy()), tuple(d if isinstance(d, int) else str(d.value) for d in v.shape)
                )
                for v in values
                if v.dtype is not None and v.shape is not None
            ]
            for values in (model.graph.inputs, model.graph.outputs)
        ]
        return OnnxModel(model, Signature(tuple(specs[0]), tuple(specs[1])))

    return make


@pytest.fixture
def residual(net: Callable[..., OnnxModel]) -> OnnxModel:
    """A stem, a residual block that keeps its shape, one that downsamples, a pool and a classifier."""
    rng = np.random.default_rng(5)

    def conv(after: int, before: int, kernel: int) -> Array:
        return (rng.standard_normal((after, before, kernel, kernel)) * (2 / (before * kernel**2)) ** 0.5).astype("f")

    return net(
        """g (float[batch,3,16,16] image) => (float[batch,16] logits) {
            s = Conv <pads = [1, 1, 1, 1]> (image, w0, b0)
            x0 = Relu(s)
            a = Conv <pads = [1, 1, 1, 1]> (x0, w1, b1)
            ar = Relu(a)
            c = Conv <pads = [1, 1, 1, 1]> (ar, w2, b2)
            d = Add(c, x0)
            x1 = Relu(d)
            e = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x1, w3, b3)
            er = Relu(e)
            f = Conv <pads = [1, 1, 1, 1]> (er, w4, b4)
            h = Conv <strides = [2, 2]> (x1, w5, b5)
            i = Add(f, h)
            x2 = Relu(i)
            p = GlobalAveragePool(x2)
            q = Flatten(p)
            logits = Gemm <transB = 1> (q, w6, b6)
        }""",
        w0=conv(16, 3, 3),
        w1=conv(16, 16, 3),
        w2=conv(16, 16, 3),
        w3=conv(32, 16, 3),
        w4=conv(32, 32, 3),
        w5=conv(32, 16, 1),
        w6=conv(16, 32, 1)[:, :, 0, 0],
        **{f"b{i}": rng.standard_normal(n).astype("f") / 4 for i, n in enumerate((16, 16, 16, 32, 32, 32, 16))},
    )


@pytest.fixture
def images(array_data: Callable[..., Data]) -> Data:
    """64 images for ``residual``."""
    return array_data({"image": np.random.default_rng(6).standard_normal((64, 3, 16, 16)).astype("f")})
