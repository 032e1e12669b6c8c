"""Builds and times engines on the GPU beside PyTorch and ONNX Runtime, all of them interleaved in one run.

    OPTKIT_TENSORRT_PYTHON=trt-python python -m benchmarks.gpu.bench resnet50:32,1,128 vit_s:32 --out results

Every entrant takes and gives float32 (or token ids) and is timed between two CUDA events on inputs that lie on the GPU.
``results.json`` is written anew after every batch size, so that a run that is cut short keeps what it has measured.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.gpu.prepare import prepare_in_background, torch_model
from optkit.context import Context
from optkit.data import random_data
from optkit.models import DimRange, Engine, Feeds, OnnxModel, Signature, TorchModel
from optkit.numerics import compare
from optkit.passes.build_engine import BuildEngine
from optkit.passes.fix_sizes import fix_sizes
from optkit.passes.legalize import express
from optkit.recipe import LatencySettings
from optkit.targets import cuda
from optkit.targets.base import WEAK_TYPES, Runner
from optkit.targets.onnxruntime import open_onnx
from optkit.targets.onnxruntime_cuda import OnnxRuntimeCudaTarget
from optkit.targets.pytorch_cuda import TorchCudaRunner
from optkit.targets.tensorrt import TensorRtTarget
from optkit.targets.worker_client import worker_python
from optkit.validation.contest import Contest, Entrant
from optkit.validation.latency import latency_document, measure_latency

SETTINGS = LatencySettings(rounds=10, seconds=0.1, warmup=0.3)

INT8, FP16 = "TensorRT INT8", "TensorRT FP16"


class Bench:
    """One run: where graphs come from, where results go, and when the time is over."""

    def __init__(self, chosen: argparse.Namespace) -> None:
        self.work, self.out = Path(chosen.work), Path(chosen.out)
        self.deadline = time.monotonic() + chosen.seconds
        self.compile, self.twice = chosen.compile, chosen.twice
        self.target = TensorRtTarget(timing_cache=str(self.out / "timing"))
        self.threads = chosen.threads
        self.document: dict[str, Any] = {"command": sys.argv, "gpu": _gpu(), "engines": {}, "runs": []}

    def run(self, name: str, batch: int) -> None:
        """Build both engines for a batch size, and time everyone."""
        started = time.monotonic()
        torch_side = torch_model(name)
        signature = replace(torch_side.signature, dims={"batch": DimRange(batch, batch, batch)})
        torch_side = replace(torch_side, signature=signature)
        context = Context(
            self.target, Path(tempfile.mkdtemp(dir=self.work)), random_data(signature), threads=self.threads
        )
        graphs = {
            p: fix_sizes(_load(self.work / f"{name}-{p}.onnx", signature), context) for p in ("fp32", "fp16", "int8")
        }
        if self.twice:
            self.build_twice(f"{name} batch {batch} int8", graphs["int8"], context)
            return
        engines = {p: self.build(f"{name} batch {batch} {p}", graphs[p], context) for p in ("fp16", "int8")}
        row: dict[str, Any] = {"model": name, "batch": batch, "failed": {}}
        with contextlib.ExitStack() as opened:
            entrants = list(self.entrants(name, torch_side, graphs, engines, context, opened, row["failed"]))
            feeds = signature.random_feeds(np.random.default_rng(0))
            row["accuracy"] = _accuracy(entrants, graphs, engines, feeds, self.threads)
            candidate = entrants.pop(
                next(i for i, e in enumerate(entrants) if e.name == (INT8 if engines["int8"] else FP16))
            )
            contest = Contest(tuple(entrants), candidate, entrants[0].name)
            latency = measure_latency(contest, random_data(signature), context, SETTINGS, 0.95)
            row["latency"] = latency_document(latency, SETTINGS)
            runners: dict[str, Any] = {e.name: e.runner for e in contest.entrants if e.name.startswith("TensorRT")}
            row["with_transfers_ms"] = {
                key: 1e3 * float(np.median(runner.with_transfers().time(feeds, 200))) for key, runner in runners.items()
            }
            row["layers_us"] = {
                key: {layer["name"]: round(1e6 * layer["seconds"], 2) for layer in runner.profile(feeds)}
                for key, runner in runners.items()
            }
        row["seconds"] = round(time.monotonic() - started, 1)
        self.document["runs"].append(row)
        self.save()
        _show(row)

    def build(
        self, what: str, graph: OnnxModel, context: Context, target: TensorRtTarget | None = None
    ) -> Engine | None:
        """The engine, or None with the reason in the results."""
        folder = Path(tempfile.mkdtemp(dir=self.work))
        started = time.perf_counter()
        try:
            engine = BuildEngine(target=target or self.target).run(graph, replace(context, scratch=folder))
        except Exception as error:  # one failure must not cost the rest of the lease
            print(f"{what}: {error}", flush=True)
            self.document["engines"][what] = {"failed": str(error)}
            return None
        records = dict(engine.records)
        layers = records["inspector"].pop("layers")
        (self.out / f"layers-{what.replace(' ', '-')}.json").write_text(json.dumps(layers))
        self.document["engines"][what] = {"seconds_in_all": time.perf_counter() - started, **records}
        print(f"{what}: {json.dumps({k: records[k] for k in ('seconds', 'timing_cache', 'inspector')})}", flush=True)
        self.save()
        return engine

    def build_twice(self, what: str, graph: OnnxModel, context: Context) -> None:
        """Build without a timing cache and with the one of that build, both with optkit and with TensorRT alone."""
        import onnx_ir as ir

        ours = self.target.model_copy(update={"timing_cache": str(self.out / "timing-twice")})
        legal = express(graph, ours.dialect, context).model
        onnx = self.work / "bare.onnx"
        ir.save(legal.ir, onnx)
        flags = ",".join(legal.records[WEAK_TYPES]["precisions"])
        for which in ("cold", "again"):
            self.build(f"{what} {which}", graph, context, ours)
            log = self.out / f"bare-{which}.log"
            command = [worker_python(), "benchmarks/gpu/bare_build.py", onnx, "--precisions", flags, "--log", log]
            command += ["--plan", self.work / "bare.plan", "--cache", self.work / "bare.cache"]
            started = time.perf_counter()
            done = subprocess.run(list(map(str, command)), stdout=subprocess.PIPE, check=True, text=True)
            told = {"seconds_in_all": time.perf_counter() - started, **json.loads(done.stdout)}
            self.document["engines"][f"{what} {which}, TensorRT alone"] = told
            print(f"{what} {which}, TensorRT alone: {told}", flush=True)
            self.save()

    def entrants(
        self,
        name: str,
        torch_side: TorchModel,
        graphs: dict[str, OnnxModel],
        engines: dict[str, Engine | None],
        context: Context,
        opened: contextlib.ExitStack,
        failed: dict[str, str],
    ) -> Iterator[Entrant]:
        """Everyone who can run; the others with their reasons in ``failed``."""
        images = name not in ("vit_s", "bert_base")

        def ort(precision: str, nhwc: bool) -> Runner:
            folder = Path(tempfile.mkdtemp(dir=self.work))
            target = OnnxRuntimeCudaTarget(nhwc=nhwc)
            return target.open(target.build(graphs[precision], folder, context), 4)

        wanted: dict[str, Any] = {
            "PyTorch FP32": lambda: TorchCudaRunner(torch_side, half=False, channels_last=images),
            "PyTorch FP16": lambda: TorchCudaRunner(torch_side, half=True, channels_last=images),
            "PyTorch FP16 graph": lambda: TorchCudaRunner(torch_side, half=True, channels_last=images, mode="graph"),
            "ORT CUDA FP32": lambda: ort("fp32", False),
            "ORT CUDA FP16": lambda: ort("fp16", False),
        }
        if images:
            wanted["ORT CUDA FP16 NHWC"] = lambda: ort("fp16", True)
        if self.compile:
            wanted["torch.compile FP16 graph"] = lambda: TorchCudaRunner(torch_side, True, images, mode="compile")
        for label, precision in ((FP16, "fp16"), (INT8, "int8")):
            engine = engines[precision]
            if engine is not None:
                wanted[label] = lambda engine=engine: self.target.open(engine, 1)
        feeds = torch_side.signature.random_feeds(np.random.default_rng(1))
        for label, open_runner in wanted.items():
            try:
                runner = opened.enter_context(open_runner())
                runner.time(feeds, 3)
            except Exception as error:  # as above
                failed[label] = f"{type(error).__name__}: {error}"
                print(f"{name} {label}: {failed[label]}"[:2000], flush=True)
                continue
            yield Entrant(label, runner)

    def save(self) -> None:
        """Write the results so far."""
        aside = self.out / "results.part"
        aside.write_text(json.dumps(self.document, indent=1))
        aside.replace(self.out / "results.json")


def _accuracy(
    entrants: list[Entrant], graphs: dict[str, OnnxModel], engines: dict[str, Engine | None], feeds: Feeds, threads: int
) -> dict[str, Any]:
    """Everyone against the first (PyTorch FP32), and the INT8 engine against the INT8 graph on the CPU."""
    outputs = {entrant.name: entrant.runner.run(feeds) for entrant in entrants}
    reference = outputs[entrants[0].name]
    found = {name: compare(reference, given) for name, given in outputs.items()}
    if INT8 in outputs:
        with open_onnx(graphs["int8"], threads, optimize=False) as runner:
            found["TensorRT INT8 against its ONNX"] = compare(runner.run(feeds), outputs[INT8])
    return {
        name: {"cosine": d.cosine, "sqnr_db": min(d.sqnr_db, 999.0), "max_abs": d.max_abs} for name, d in found.items()
    }


def _load(path: Path, signature: Signature) -> OnnxModel:
    import onnx_ir as ir

    return OnnxModel(ir.load(path), signature)


def _gpu() -> dict[str, Any]:
    found = cuda.detect()
    return {"name": found.gpus[0].name, "driver": found.driver, "cuda": found.cuda, "clocks_mhz": cuda.clocks()}


def _show(row: dict[str, Any]) -> None:
    print(f"\n{row['model']}, batch {row['batch']} ({row['seconds']} s)")
    ratios = row["latency"]["ratios"]
    for name, told in row["latency"]["runners"].items():
        ratio = ratios.get(name)
        shown = f"{ratio['ratio']:.2f} [{ratio['interval'][0]:.2f}, {ratio['interval'][1]:.2f}]" if ratio else ""
        cosine = row["accuracy"].get(name, {}).get("cosine")
        print(
            f"  {name:26} {told['median_ms']:8.3f} ms  {told['throughput_per_s']:9.0f}/s  cosine {cosine:.5f}  {shown}"
        )
    print(
        f"  with transfers: {row['with_transfers_ms']}; {row['accuracy'].get('TensorRT INT8 against its ONNX')}",
        flush=True,
    )


def main() -> None:
    """Run what is asked for until the time is over."""
    parser = argparse.ArgumentParser()
    parser.add_argument("models", nargs="+", help="model:batch,batch")
    parser.add_argument("--out", required=True)
    parser.add_argument("--work", default="/tmp/bench")
    parser.add_argument("--seconds", type=float, default=3600, help="start no batch size after so many seconds")
    parser.add_argument("--threads", type=int, default=8)
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument(
        "--twice",
        action="store_true",
        help="only build INT8 without a timing cache, and again, with optkit and with TensorRT alone",
    )
    chosen = parser.parse_args()
    for folder in (chosen.out, chosen.work):
        Path(folder).mkdir(parents=True, exist_ok=True)
    bench = Bench(chosen)
    asked = [
        (name, [int(b) for b in batches.split(",")]) for name, _, batches in (m.partition(":") for m in chosen.models)
    ]
    running = {name: prepare_in_background(name, bench.work, chosen.threads) for name, _ in asked}
    for name, batches in asked:
        running[name].wait()
        for batch in batches:
            if time.monotonic() > bench.deadline:
                print(f"{name} batch {batch}: not run, the time is over")
                continue
            try:
                bench.run(name, batch)
            except Exception as error:  # one failure must not cost the rest of the lease
                import traceback

                traceback.print_exc()
                bench.document["runs"].append({"model": name, "batch": batch, "error": str(error)})
                bench.save()


if __name__ == "__main__":
    main()
