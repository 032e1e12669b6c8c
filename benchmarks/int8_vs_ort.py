"""optkit's INT8 beside onnxruntime.quantization: same float model, same calibration samples, same runtime, one thread.

    python benchmarks/int8_vs_ort.py [--models resnet8 efficientnet] [--rounds 15] [--out .out/bench]

Latency is processor time of one thread at batch 1, every entrant in every round, in an order that turns round by round;
the ratio to a rival is the median over rounds with its bootstrap interval. Writes ``int8_vs_ort.json`` into --out.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from onnxruntime.quantization import CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from onnxruntime.quantization.shape_inference import quant_pre_process

from optkit.bundle import save_onnx
from optkit.context import Context
from optkit.data import Data, open_data
from optkit.metrics import Batch
from optkit.models import OnnxModel
from optkit.numerics import compare
from optkit.passes.quantize_int8 import QuantizeInt8
from optkit.pipeline import run_passes
from optkit.quantize.calibration import Calibration
from optkit.recipe import Recipe
from optkit.source import load_model
from optkit.targets.cpu import this_cpu
from optkit.targets.onnxruntime import OnnxRuntimeTarget
from optkit.validation.statistics import ratio_of_rounds

Array = np.ndarray[Any, Any]

ROOT = Path(__file__).resolve().parents[1]
TURN_SECONDS = 0.05


@dataclass(frozen=True)
class Case:
    recipe: str
    calibration: int
    evaluation: int


# ONNX Runtime's percentile keeps every activation of every sample: 24 photographs take 1.5 GB
CASES = {
    "resnet8": Case("recipes/fashion-resnet8-int8.yaml", 256, 10_000),
    "efficientnet": Case("recipes/efficientnet-lite0-int8.yaml", 24, 320),
}

U8S8 = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8, "per_channel": True}
PERCENTILE = {"calibrate_method": CalibrationMethod.Percentile}
RIVALS: dict[str, dict[str, Any]] = {
    "ORT default": {},
    "ORT U8S8 min-max": U8S8,
    "ORT U8S8 min-max, 7 bits": {**U8S8, "reduce_range": True},
    "ORT U8S8 percentile": {**U8S8, **PERCENTILE},
    "ORT U8S8 percentile, 7 bits": {**U8S8, **PERCENTILE, "reduce_range": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", type=Path, default=ROOT / ".out/bench")
    given = parser.parse_args()
    found = {name: measure(CASES[name], given.rounds) for name in given.models}
    for name, rows in found.items():
        print(f"\n{name}\n{table(rows)}")
    given.out.mkdir(parents=True, exist_ok=True)
    document = {"onnxruntime": ort.__version__, "cpu": this_cpu().name, "threads": 1, "models": found}
    (given.out / "int8_vs_ort.json").write_text(json.dumps(document, indent=1))


def measure(case: Case, rounds: int) -> list[dict[str, Any]]:
    """One row for the float model, for optkit and for each rival."""
    recipe = Recipe.load(ROOT / case.recipe)
    assert recipe.data is not None
    data = open_data(recipe.data, recipe.seed)
    with tempfile.TemporaryDirectory() as scratch:
        context = Context(OnnxRuntimeTarget(), Path(scratch), data, recipe.seed)
        path = Path(scratch) / "float.onnx"
        model = float_model(recipe, context)
        save_onnx(model, path)
        seconds = {"float": 0.0, "optkit": cpu_seconds(lambda: with_optkit(model, case, context))}
        for name, options in RIVALS.items():
            target = Path(scratch) / f"{name}.onnx"
            seconds[name] = cpu_seconds(lambda o=options, t=target: with_ort(path, t, data, case, o))  # type: ignore[misc]
        sessions = {name: session(Path(scratch) / f"{name}.onnx") for name in seconds}
    batches = list(data.batches("validation", 16, case.evaluation))
    accuracies = accuracy(sessions, batches, data)
    times = latencies(sessions, dict(next(iter(data.batches("validation", 1, 1))).feeds), rounds)
    return [
        {"name": name, "quantize_cpu_s": seconds[name], **accuracies[name], **speed(times, name)} for name in sessions
    ]


def float_model(recipe: Recipe, context: Context) -> OnnxModel:
    loaded = load_model(recipe.model.checkpoint or "", recipe, context.data.inputs if context.data else None)
    steps = [step for step in recipe.passes if step.use in ("export_onnx", "optimize_graph")]
    model = run_passes(steps, loaded.model, context)[-1].model
    assert isinstance(model, OnnxModel)
    return model


def with_optkit(model: OnnxModel, case: Case, context: Context) -> None:
    step = QuantizeInt8(calibrate=Calibration(samples=case.calibration))
    stages = run_passes([step], model, context)
    after = stages[-1].model
    assert isinstance(after, OnnxModel)
    save_onnx(after, context.scratch / "optkit.onnx")


class Reader(CalibrationDataReader):  # type: ignore[misc]  # onnxruntime has no types
    def __init__(self, data: Data, case: Case) -> None:
        self._rest = data.batches("calibration", 1, case.calibration)

    def get_next(self) -> dict[str, Array] | None:
        batch = next(self._rest, None)
        return None if batch is None else dict(batch.feeds)


def with_ort(path: Path, target: Path, data: Data, case: Case, options: dict[str, Any]) -> None:
    prepared = target.with_suffix(".prepared.onnx")
    with contextlib.redirect_stdout(io.StringIO()):  # it tells its progress
        quant_pre_process(path, prepared, skip_symbolic_shape=True)
        quantize_static(prepared, target, Reader(data, case), **options)


def cpu_seconds(work: Callable[[], None]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def session(path: Path) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def accuracy(sessions: dict[str, Any], batches: list[Batch], data: Data) -> dict[str, dict[str, float]]:
    names = [output.name for output in sessions["float"].get_outputs()]
    outputs = {
        entrant: [dict(zip(names, opened.run(None, dict(batch.feeds)), strict=True)) for batch in batches]
        for entrant, opened in sessions.items()
    }
    whole = {
        entrant: {n: np.concatenate([part[n] for part in parts]) for n in names} for entrant, parts in outputs.items()
    }
    rows = {
        entrant: np.concatenate(
            [data.metric.records(*each) for each in zip(parts, batches, outputs["float"], strict=True)]
        )
        for entrant, parts in outputs.items()
    }
    return {
        entrant: {
            "score": data.metric.score(rows[entrant]),
            "sqnr_db": compare(whole["float"], arrays).outputs[names[0]].sqnr_db,
        }
        for entrant, arrays in whole.items()
    }


def latencies(sessions: dict[str, Any], feeds: dict[str, Array], rounds: int) -> dict[str, list[Array]]:
    calls = {name: max(5, round(TURN_SECONDS / float(np.median(turn(s, feeds, 10))))) for name, s in sessions.items()}
    times: dict[str, list[Array]] = {name: [] for name in sessions}
    order = list(sessions)
    for _ in range(rounds):
        for name in order:
            times[name].append(turn(sessions[name], feeds, calls[name]))
        order = order[1:] + order[:1]
    return times


def turn(opened: Any, feeds: dict[str, Array], calls: int) -> Array:
    """Processor seconds of this thread, call by call."""
    opened.run(None, feeds)  # another session had the caches until now
    marks = [time.thread_time_ns()]
    for _ in range(calls):
        opened.run(None, feeds)
        marks.append(time.thread_time_ns())
    return np.diff(marks) * 1e-9


def speed(times: dict[str, list[Array]], name: str) -> dict[str, Any]:
    """Milliseconds, how many times as fast as the float model, and how many times as fast optkit is as this one."""
    rng = np.random.default_rng(0)
    to_float = ratio_of_rounds(times["float"], times[name], 0.95, rng)
    optkit = ratio_of_rounds(times[name], times["optkit"], 0.95, rng)
    return {
        "ms": 1000 * float(np.median(np.concatenate(times[name]))),
        "speedup": [to_float.estimate, to_float.low, to_float.high],
        "optkit_speedup": [optkit.estimate, optkit.low, optkit.high],
    }


def table(rows: list[dict[str, Any]]) -> str:
    lines = [f"{'':30}{'score':>8}{'SQNR dB':>9}{'ms':>9}{'x float':>22}{'optkit is x faster':>22}{'CPU s':>8}"]
    for row in rows:
        ratios = [f"{a:.2f} [{b:.2f}, {c:.2f}]" for a, b, c in (row["speedup"], row["optkit_speedup"])]
        lines.append(
            f"{row['name']:30}{row['score']:8.4f}{row['sqnr_db']:9.1f}{row['ms']:9.3f}"
            f"{ratios[0]:>22}{ratios[1]:>22}{row['quantize_cpu_s']:8.1f}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
