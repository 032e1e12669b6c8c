"""Makes the models of the GPU benchmark: PyTorch with random weights, and ONNX in FP32, FP16 and INT8.

    python -m benchmarks.gpu.prepare resnet50 --out /tmp/bench --threads 4

Random weights do for latency. BatchNorm statistics come from random batches, so that values stay in a sane range.
Everything runs on the CPU; only the target of the graphs needs to be known, so OPTKIT_TENSORRT_PYTHON must be set.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optkit.context import Context
from optkit.data import random_data
from optkit.models import DimRange, OnnxModel, Signature, TensorSpec, TorchModel
from optkit.passes.cast_fp16 import CastFp16
from optkit.passes.export_onnx import ExportOnnx
from optkit.passes.optimize_graph import OptimizeGraph
from optkit.passes.quantize_int8 import Calibration, QuantizeInt8
from optkit.targets.tensorrt import TensorRtTarget

if TYPE_CHECKING:
    import torch

TOKENS = 128


def torch_model(name: str) -> TorchModel:
    """The module of that name, and its signature with a dynamic batch."""
    import torch

    torch.manual_seed(0)
    module, text = _module(name)
    dims = {"batch": DimRange(1, 2, 128)}
    if text:
        tokens = tuple(TensorSpec(key, "int64", ("batch", TOKENS)) for key in ("input_ids", "attention_mask"))
        signature = Signature(tokens, (TensorSpec("pooled", "float32", ("batch", 768)),), dims)
    else:
        image = TensorSpec("image", "float32", ("batch", 3, 224, 224))
        signature = Signature((image,), (TensorSpec("logits", "float32", ("batch", 1000)),), dims)
        _settle(module)
    return TorchModel(module.eval(), signature)


def _module(name: str) -> tuple[torch.nn.Module, bool]:
    import torch
    import transformers as hf

    if name == "resnet50":  # v1.5, as timm's and torchvision's: the stride is in the 3x3 convolution
        return _Logits(hf.ResNetForImageClassification(hf.ResNetConfig(num_labels=1000))), False
    if name == "efficientnet_b0":
        config = hf.EfficientNetConfig(
            width_coefficient=1.0, depth_coefficient=1.0, image_size=224, hidden_dim=1280, num_labels=1000
        )
        network = hf.EfficientNetForImageClassification(config)
        # The same average; transformers writes it as a pooling of 1280x1280, which TensorRT does not take
        network.efficientnet.pooler = torch.nn.AdaptiveAvgPool2d(1)
        return _Logits(network), False
    if name == "vit_s":
        config = hf.ViTConfig(hidden_size=384, num_attention_heads=6, intermediate_size=1536, num_labels=1000)
        return _Logits(hf.ViTForImageClassification(config)), False
    if name == "bert_base":
        return _Pooled(hf.BertModel(hf.BertConfig())), True
    raise SystemExit(f"no model is called {name!r}")


def _wrappers() -> tuple[Any, Any]:
    import torch

    class Logits(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.model(image).logits

    class Pooled(torch.nn.Module):
        def __init__(self, model: torch.nn.Module) -> None:
            super().__init__()
            self.model = model

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids, attention_mask).pooler_output

    return Logits, Pooled


_Logits, _Pooled = _wrappers()


def _settle(module: torch.nn.Module) -> None:
    """Set the running statistics of every BatchNorm from two random batches."""
    import torch

    norms = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]
    for norm in norms:
        torch.nn.init.ones_(norm.weight)  # transformers draws those of EfficientNet at random, and all values vanish
        norm.momentum = None  # the cumulative average
    if norms:
        module.train()
        with torch.no_grad():
            for _ in range(2):
                module(torch.randn(8, 3, 224, 224))


def prepare(name: str, out: Path, threads: int) -> dict[str, OnnxModel]:
    """Write ``<name>-<precision>.onnx``; a ``.json`` beside each says how long its passes took."""
    import onnx_ir as ir
    import torch

    torch.set_num_threads(threads)
    started = time.perf_counter()
    model = torch_model(name)
    inner = getattr(model.module, "model")  # noqa: B009 (a module's attributes are typed as tensors)
    if hasattr(inner, "set_attn_implementation"):
        # PyTorch's fused attention exports with guards against rows that are masked whole, which there are none of
        inner.set_attn_implementation("eager")
    context = Context(TensorRtTarget(), out, random_data(model.signature), threads=threads)
    exported = ExportOnnx().run(model, context)
    optimized = OptimizeGraph().run(exported, context)
    half = CastFp16(keep_ops=())  # the means of 49 values do not overflow, and float32 islands cost reformats
    calibration = Calibration(method="max", samples=32, batch_size=8)
    # Random weights have no accuracy to keep: what is done for it would take most of the time here
    quantize = QuantizeInt8(calibrate=calibration, smooth=False, round="nearest", correct_bias=False)
    models = {
        "fp32": optimized,
        "fp16": half.run(optimized, context),
        "int8": half.run(quantize.run(optimized, context), context),
    }
    for precision, graph in models.items():
        aside = out / f"{name}-{precision}.part"
        ir.save(graph.ir, aside)
        aside.rename(out / f"{name}-{precision}.onnx")
    seconds = round(time.perf_counter() - started, 1)
    (out / f"{name}.json").write_text(json.dumps({"seconds": seconds}))
    print(f"{name} prepared in {seconds} s", flush=True)
    return models


def prepare_in_background(name: str, out: Path, threads: int) -> subprocess.Popen[bytes]:
    """Start ``prepare`` in a process of its own, unless its files are there."""
    if (out / f"{name}.json").exists():
        return subprocess.Popen(["true"])
    command = [sys.executable, "-m", "benchmarks.gpu.prepare", name, "--out", str(out), "--threads", str(threads)]
    return subprocess.Popen(command, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=4)
    chosen = parser.parse_args()
    chosen.out.mkdir(parents=True, exist_ok=True)
    prepare(chosen.model, chosen.out, chosen.threads)
