"""Hands PyCUDA's arrays to an engine, and its outputs back to PyCUDA.

    pip install 'optkit[gpu,pycuda]'
    optkit compile model.pt2 --precision fp16 --target tensorrt --out bundle
    python examples/pycuda_gpuarray.py bundle

An engine takes whatever has ``__cuda_array_interface__`` (PyCUDA, CuPy, PyTorch), and then gives arrays that have it.
TensorRT runs in a process of its own: inputs and outputs are copied within the GPU, not through host memory.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import optkit


def run(path: str) -> dict[str, Any]:
    """The outputs of a bundle's engine for random inputs, as PyCUDA's arrays."""
    import pycuda.autoprimaryctx  # noqa: F401 (the context that PyTorch and optkit use too)
    from pycuda import gpuarray

    bundle = optkit.load(path)
    feeds = bundle.signature.random_feeds(np.random.default_rng(0))
    on_gpu = {name: gpuarray.to_gpu(array) for name, array in feeds.items()}
    outputs = bundle(on_gpu)
    return {name: gpuarray.GPUArray(a.shape, a.dtype, gpudata=a.pointer, base=a) for name, a in outputs.items()}


if __name__ == "__main__":
    for name, array in run(sys.argv[1]).items():
        print(f"{name}: {array.dtype}{list(array.shape)} on the GPU, sum {float(array.get().sum()):g}")
