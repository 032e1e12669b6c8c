from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import optkit
from optkit.recipe import Recipe

QUICK = {"latency": {"rounds": 6, "seconds": 0.01, "warmup": 0.05}}


@pytest.mark.filterwarnings("default::DeprecationWarning")  # PyTorch's compiler warns of PyTorch
def test_times_pytorch_onnxruntime_and_tensorrt_side_by_side_on_the_gpu():
    if not torch.cuda.is_available():
        pytest.skip("torch sees no GPU")
    torch.manual_seed(0)
    # Wide enough for FP16 to be the faster one: an engine that has none of it is refused
    net = nn.Sequential(
        *(nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 128, 3, padding=1), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)),
    )
    recipes = [
        Recipe.load(name).updated(inputs={"input": "float32[batch,3,64,64]"}, validation=QUICK)
        for name in ("fp32", "fp16")
    ]
    found = optkit.bench(
        net,
        recipes,
        on=("torch", "onnxruntime-cuda", "tensorrt"),
        batches=(1, 16),
        contexts=(1, 2),
        transfers=True,
        bound=1.0,
    )
    names = {row.contestant for row in found.rows}
    assert {"PyTorch fp32", "PyTorch fp16 channels_last", "PyTorch fp16 channels_last CUDA graph"} <= names
    assert {"tensorrt fp32", "tensorrt fp16", "tensorrt fp16, 2 at once"} <= names, found.not_run
    assert "tensorrt fp16, with transfers" in names
    assert {row.batch for row in found.rows} == {1, 16}
    assert len({row.device for row in found.rows}) == 1
    assert all(row.cosine > 0.999 and np.isfinite(row.throughput) for row in found.rows)
    assert {row.against for row in found.rows} == {"PyTorch fp32"}
