"""What calibration costs: all four range methods from one pass, beside plain inference and ONNX Runtime's entropy.

    python benchmarks/int8/calibration.py [--models efficientnet resnet8 minilm] [--rounds 3]

Processor seconds on one thread, imports and reading the model left out, the median of rounds that take turns; peak
memory of the process. ``run.py`` must have prepared the models and, for ONNX Runtime, made its environment.
Results: .out/bench-int8/<model>/calibration.json. The parent needs the standard library only.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from cases import CASES, OUT
from run import _measured

WAYS = ("inference", "optkit", "ort")
FOURFOLD = "optkit, 4 times the samples"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=CASES, default=["efficientnet", "resnet8", "minilm"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--child", nargs=3, metavar=("WAY", "TIMES", "RESULT"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        way, times, result = given.child
        Path(result).write_text(json.dumps(_run(way, given.models[0], int(times))))
        return
    print("| model | samples | " + " | ".join(_HEAD) + " |\n|" + "---|" * (len(_HEAD) + 2))
    for name in given.models:
        print(_row(name, _rounds(name, given.rounds)), flush=True)


_HEAD = (
    "FP32 inference, CPU s",
    "optkit: pass + four methods, CPU s",
    "of inference",
    "peak MB, with 4 times the samples",
    "ORT entropy, CPU s",
    "of optkit's",
    "ORT peak MB",
)


def _rounds(name: str, rounds: int) -> dict[str, list[dict[str, float]]]:
    """What every child measured, by way; written down after each round."""
    found: dict[str, list[dict[str, float]]] = {}
    for number in range(rounds):
        for way in (*WAYS, FOURFOLD) if number == 0 else WAYS:
            done = _child(name, way)
            if done is not None:
                found.setdefault(way, []).append(done)
        (OUT / name / "calibration.json").write_text(json.dumps(found, indent=1))
    return found


def _child(name: str, way: str) -> dict[str, float] | None:
    python = OUT / "venv-ort/bin/python" if way == "ort" else Path(sys.executable)
    if not python.exists():
        return None
    folder, (kind, times) = OUT / name, (("optkit", 4) if way == FOURFOLD else (way, 1))
    result = folder / f"calibration-{kind}.tmp.json"
    command = [python, Path(__file__).resolve(), "--models", name, "--child", kind, str(times), result]
    done = _measured(command, folder / "calibration.log")
    if "error" in done:
        sys.exit(f"{name}: {way} failed: {done['error']} (see {folder / 'calibration.log'})")
    seconds: dict[str, float] = json.loads(result.read_text())
    result.unlink()
    return {**seconds, "peak_mb": done["peak_mb"]}


def _row(name: str, found: dict[str, list[dict[str, float]]]) -> str:
    seconds = {way: median(sum(v for k, v in one.items() if k != "peak_mb") for one in found[way]) for way in found}
    peaks = {way: max(one["peak_mb"] for one in found[way]) for way in found}
    cells = [
        f"{seconds['inference']:.2f}",
        f"{seconds['optkit']:.2f}",
        f"{seconds['optkit'] / seconds['inference']:.2f}",
        f"{peaks['optkit']:.0f}, {peaks[FOURFOLD]:.0f}",
        f"{seconds['ort']:.2f}" if "ort" in found else "not run",
        f"{seconds['ort'] / seconds['optkit']:.1f}" if "ort" in found else "",
        f"{peaks['ort']:.0f}" if "ort" in found else "",
    ]
    return f"| {CASES[name].title} | {CASES[name].calibration} | " + " | ".join(cells) + " |"


def _run(way: str, name: str, times: int) -> dict[str, float]:
    return {"inference": _inference, "optkit": _optkit, "ort": _ort}[way](OUT / name, CASES[name].calibration, times)


def _timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.process_time()
    result = call()
    return time.process_time() - start, result


def _inference(folder: Path, count: int, times: int) -> dict[str, float]:
    """The float model over the samples, in the batches that calibration takes."""
    model, _, size = _placed(folder)
    from optkit.targets.onnxruntime import open_onnx

    def infer() -> None:
        with open_onnx(model) as runner:
            for batch in _batches(folder, count, times, size):
                runner.view(batch.feeds)

    return {"infer": _timed(infer)[0]}


def _optkit(folder: Path, count: int, times: int) -> dict[str, float]:
    """One pass, then the scales of every tensor by each method."""
    model, placement, size = _placed(folder)
    from optkit.quantize.calibration import scales
    from optkit.quantize.observers import observe
    from optkit.quantize.scales import RANGE_METHODS
    from optkit.targets.base import ORT_CPU

    batches = _batches(folder, count, times, size)
    seconds, statistics = _timed(lambda: observe(model, placement.observed, batches))
    by_method = {method: _timed(partial(scales, placement, statistics, ORT_CPU, method))[0] for method in RANGE_METHODS}
    return {"observe": seconds, **by_method}


def _placed(folder: Path) -> tuple[Any, Any, int]:
    """The float model, where its Q/DQ pairs go, everything static, and how many samples are run at a time."""
    from samples import Samples

    from optkit.models import TensorSpec
    from optkit.quantize.calibration import Calibration
    from optkit.quantize.placement import name_nodes, place
    from optkit.quantize.samples import batch_size
    from optkit.recipe import Recipe
    from optkit.source import load_model
    from optkit.targets.base import ORT_CPU

    arrays = Samples.load(folder / "calibration").arrays
    inputs = tuple(TensorSpec(name, array.dtype.name, ("batch", *array.shape[1:])) for name, array in arrays.items())
    model = load_model(folder / "float.onnx", Recipe.load("int8"), inputs).model.clone()
    name_nodes(model)
    placement = place(model, ORT_CPU)
    return model, placement, batch_size(model, placement, Calibration().batch_size)


def _batches(folder: Path, count: int, times: int, size: int) -> Iterator[Any]:
    from samples import Samples

    from optkit.data import Batch

    for _ in range(times):
        for feeds in Samples.load(folder / "calibration").first(count).batches(size):
            yield Batch(feeds, None)


def _ort(folder: Path, count: int, times: int) -> dict[str, float]:
    """onnxruntime.quantization's own calibrator, as ``quantize_static`` calls it."""
    from onnxruntime.quantization import CalibrationMethod
    from onnxruntime.quantization.calibrate import create_calibrator
    from onnxruntime.quantization.registry import QLinearOpsRegistry
    from quantize_ort import Reader
    from samples import Samples

    def calibrate() -> None:
        calibrator = create_calibrator(
            folder / "float.onnx",
            list(QLinearOpsRegistry),
            augmented_model_path=str(folder / "calibration-augmented.onnx"),
            calibrate_method=CalibrationMethod.Entropy,
        )
        calibrator.collect_data(Reader(Samples.load(folder / "calibration").first(count)))
        calibrator.compute_data()

    seconds, _ = _timed(calibrate)
    for path in folder.glob("calibration-augmented.onnx*"):
        path.unlink()
    return {"calibrate": seconds}


if __name__ == "__main__":
    main()
